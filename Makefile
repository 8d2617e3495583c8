# Every target sets up .venv by itself. Ray's telemetry is off and its auth mode explicit in all of them.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
export RAY_USAGE_STATS_ENABLED := 0
export RAY_AUTH_MODE ?= disabled
export TOKENIZERS_PARALLELISM := false

.PHONY: install quickstart test test-unit lint format bench schema clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/python launch/quickstart.py

test: $(STAMP)
	$(BIN)/python -m pytest tests

test-unit: $(STAMP)
	$(BIN)/python -m pytest tests/unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(STAMP)
	$(BIN)/python -m launch.config_schema

bench: $(STAMP)
	$(BIN)/python benchmarks/against_plain_pytorch.py $(BENCH_ARGS)

clean:
	rm -rf .venv runs build dist *.egg-info
