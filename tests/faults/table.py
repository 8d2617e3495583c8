"""Writes docs/reliability.md from the catalogue and the report of a run of it.

python -m tests.faults --report tests/faults/report.json && python -m tests.faults.table
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.bench import AT, EVERY, PAUSE_S, STEPS, WORKERS
from tests.faults.catalogue import FAULTS, Fault
from tests.support.command import ROOT

REPORT = Path(__file__).with_name("report.json")
PAGE = ROOT / "docs" / "reliability.md"

_HEAD = f"""# Reliability

Faults that a run must survive, and what became of runs that had them. “The same end” means: every loss, gradient norm
and digest of the rows of all steps, and every byte of the last checkpoint's files, are those of the run that was left
alone. A stop is a clear one: the documented [exit code](exit-codes.md), and a reason that names the cause; mended, the
same command goes on to the same end.

`make faults` injects them into real runs: the command, its driver and {WORKERS} workers (processes, gloo), a tiny
model, {STEPS} steps, a checkpoint every {EVERY}. Most strike after step {AT}, so that 3 steps are lost; that depends
on `checkpoint.every_steps`. Recovery goes from the fault, or, where somebody has to give the command again, from that,
to the end of the first step that had not been done before: steps that are done again are in it, {PAUSE_S} s and more
each. An attempt begins in about two seconds here; loading large weights, and finding machines, would come on top.

This page is written by `python -m tests.faults.table` from `tests/faults/report.json`; a test holds it against the
catalogue, `tests/faults/catalogue.py`.
"""


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """Args: rows: of a report, one a fault; those that other tests inject, too, may be missing.

    Raises AssertionError where it is not of this catalogue (pure).
    """
    elsewhere = {fault.number: {"number": fault.number, "state": "elsewhere"} for fault in FAULTS if fault.tests}
    by_number = elsewhere | {row["number"]: row for row in rows}
    assert by_number.keys() == {fault.number for fault in FAULTS}, "the report is not of this catalogue; run it again"
    days = sorted({row["at"] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    states = [row["state"] for row in by_number.values()]
    summary = (
        f"Run on {when}, on 2 cores without a GPU, shared with other work: {states.count('survived')} of "
        f"{len(FAULTS)} injected and survived, {states.count('elsewhere')} tried by other tests"
    )
    for state in ("failed", "not here"):
        if state in states:
            summary += f", {states.count(state)} {state}"
    lines = [
        "| | fault | how it is injected | outcome | lost steps | recovery, s |",
        "|---|---|---|---|---|---|",
        *(_line(fault, by_number[fault.number]) for fault in FAULTS),
    ]
    return f"{_HEAD}\n{summary}.\n\n" + "\n".join(lines) + "\n"


def _line(fault: Fault, row: Mapping[str, Any]) -> str:
    lost, recovery = row.get("lost_steps"), row.get("recovery_s")
    cells = [
        str(fault.number),
        fault.name,
        fault.how,
        _outcome(fault, row),
        "" if lost is None else str(lost),
        "" if recovery is None else f"{recovery:.1f}",
    ]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _outcome(fault: Fault, row: Mapping[str, Any]) -> str:
    tests = ", ".join(f"`{Path(name).name}`" for name in fault.tests)
    match row["state"]:
        case "survived":
            return f"{row['outcome']}; also {tests}" if tests else str(row["outcome"])
        case "elsewhere":
            return f"tried by {tests}"
        case "not here":
            return f"not tried: {row['outcome']}"
    return "**not survived**"


def main() -> None:
    PAGE.write_text(page(json.loads(REPORT.read_text())))


if __name__ == "__main__":
    main()
