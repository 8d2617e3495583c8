# Every target sets up .venv by itself. Ray's telemetry is off in all of them. A Ray that Baton starts has a token of its
# own; those of tests and benchmarks have none, unless they say so.
PYTHON ?= python3
TEST_WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed
DEV_STAMP := .venv/.installed-dev
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

test test-unit bench bench-gpu chaos faults soak: export RAY_AUTH_MODE ?= disabled

.PHONY: install quickstart test test-unit lint format bench bench-gpu chaos faults soak schema clean

install: $(DEV_STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $(STAMP)

$(DEV_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $(DEV_STAMP)

quickstart: $(STAMP)
	$(BIN)/python launch/quickstart.py

# Two files at a time: much of a test is waiting, for Ray to start or a lost worker to be noticed. A process of pytest
# that dies ends the run, with the name of its test: replaced, it would leave tests that nobody runs, and a run that
# waits for them.
test: $(DEV_STAMP)
	$(BIN)/python -m pytest tests -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart=0

test-unit: $(DEV_STAMP)
	$(BIN)/python -m pytest tests/unit -n $(TEST_WORKERS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(STAMP)
	$(BIN)/python -m launch.config_schema
	$(BIN)/python helm/config_in_values_schema.py

# Kills runs at every place where they touch a file: hours. CHAOS_ARGS="--sample 100 --seed 1 --kinds kill".
chaos: $(DEV_STAMP)
	$(BIN)/python -m tests.support.chaos $(CHAOS_ARGS)

# One run for hours under random faults. SOAK_ARGS="--minutes 10 --seed 2 --launcher ray".
soak: $(DEV_STAMP)
	$(BIN)/python -m tests.support.soak $(SOAK_ARGS)

# Every fault of the catalogue in a run of its own, and docs/reliability.md anew: minutes. FAULTS_ARGS="13 16": just these.
faults: $(DEV_STAMP)
	$(BIN)/python -m tests.faults --report tests/faults/report.json $(FAULTS_ARGS)
	$(BIN)/python -m tests.faults.table

# One device, no Ray: BENCH_ARGS="--shape 7b --method full"; docs/gpu.md.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu_step.py $(BENCH_ARGS)

bench: $(STAMP)
	$(BIN)/python benchmarks/against_plain_pytorch.py $(BENCH_ARGS)

clean:
	rm -rf .venv runs build dist *.egg-info
