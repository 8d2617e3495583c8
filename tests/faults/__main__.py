"""Injects faults of the catalogue into real runs, one after the other, and tells how it went.

python -m tests.faults                      # all of them
python -m tests.faults 13 16                # these
python -m tests.faults --fast               # those that are tried with every change
python -m tests.faults --report faults.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.faults.bench import Bench, NotHere
from tests.faults.catalogue import FAULTS, Fault


def tried(bench: Bench, fault: Fault) -> dict[str, Any]:
    """One row of the report."""
    row: dict[str, Any] = {"number": fault.number, "state": "survived"}
    if fault.inject is None:
        return row | {"state": "elsewhere"}
    began = time.monotonic()
    try:
        row |= asdict(fault.inject(bench))
    except NotHere as error:
        row |= {"state": "not here", "outcome": str(error)}
    except Exception:
        row |= {"state": "failed", "outcome": traceback.format_exc()}
    return row | {"took_s": round(time.monotonic() - began, 1)}


def told(fault: Fault, row: dict[str, Any]) -> str:
    figures = [
        f"{row[name]:.3g} {unit}"
        for name, unit in (("lost_steps", "steps lost"), ("recovery_s", "s"))
        if row.get(name) is not None
    ]
    return f"{fault.number:2} {fault.name}: {row['state']}: {'; '.join([row.get('outcome', ''), *figures])}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, help="of faults; default: all")
    parser.add_argument("--fast", action="store_true", help="only those that are tried with every change")
    parser.add_argument("--report", type=Path, help="file for the results, JSON; what it says of other faults stays")
    parser.add_argument("--folder", type=Path, help="of the runs, kept afterwards; default: a temporary one")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    chosen = [
        f for f in FAULTS if (not options.numbers or f.number in options.numbers) and (f.fast or not options.fast)
    ]
    rows = (
        {row["number"]: row for row in json.loads(options.report.read_text())}
        if options.report and options.report.exists()
        else {}
    )
    failed = 0
    with ExitStack() as stack:
        root = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        root.mkdir(parents=True, exist_ok=True)
        bench = Bench(root.resolve())
        print(f"undisturbed: {bench.undisturbed.seconds:.1f} s", flush=True)
        for fault in chosen:
            row = tried(bench, fault)
            failed += row["state"] == "failed"
            print(told(fault, row), f"(took {row.get('took_s')} s)", flush=True)
            rows[fault.number] = row | {"at": time.strftime("%Y-%m-%d", time.gmtime())}
            if options.report:
                options.report.write_text(json.dumps([rows[number] for number in sorted(rows)], indent=1) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
