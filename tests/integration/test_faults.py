"""The fast part of the fault suite (`make faults` runs all of it), and the page that tells of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.catalogue import FAULTS, Fault
from tests.faults.table import PAGE, REPORT, page
from tests.support.command import ROOT, environment

FAST = [fault for fault in FAULTS if fault.fast]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """By number of the fault. In a process of its own: workers are forks of it, and must find no thread there."""
    path = tmp_path_factory.mktemp("faults") / "report.json"
    command = [sys.executable, "-m", "tests.faults", "--fast", "--report", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr)
    return {row["number"]: row for row in json.loads(path.read_text())}


@pytest.mark.parametrize("fault", FAST, ids=lambda fault: f"{fault.number}-{fault.name}".replace(" ", "-"))
def test_it_is_survived(report: dict[int, dict[str, Any]], fault: Fault) -> None:
    row = report[fault.number]
    assert row["state"] == "survived", row["outcome"]


def test_all_have_a_number_of_their_own_and_something_that_injects_them() -> None:
    assert [fault.number for fault in FAULTS] == list(range(1, 45))
    for fault in FAULTS:
        assert fault.inject or fault.tests, fault
        for name in fault.tests:
            assert (ROOT / "tests" / name).is_file(), name


def test_the_page_is_of_this_catalogue_and_its_last_report() -> None:
    assert PAGE.read_text() == page(json.loads(REPORT.read_text())), "python -m tests.faults.table"


def test_a_report_of_another_catalogue_is_noticed() -> None:
    rows = json.loads(REPORT.read_text())
    with pytest.raises(AssertionError, match="not of this catalogue"):
        page(rows[1:])


def test_the_page_tells_of_what_was_not_survived() -> None:
    rows = json.loads(Path(REPORT).read_text())
    rows[0] |= {"state": "failed", "outcome": "Traceback …"}
    assert "**not survived**" in page(rows) and "1 failed" in page(rows)
