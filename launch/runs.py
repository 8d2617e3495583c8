"""``baton runs list STORAGE``: the runs under a storage path, and how each stands."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # as a script: `python launch/runs.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_shards.storage import Storage
from launch.cli import VERBS, run_verb
from launch.exit_codes import ExitCode
from trainer.run_directory import RunDirectory, read_json
from trainer.survey import survey


def location(path: str) -> Storage:
    return Storage.at(path if "://" in path else os.path.abspath(path))  # noqa: PTH100 - keeps links


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="baton runs", description=VERBS["runs"])
    parser.add_argument("action", choices=("list",))
    parser.add_argument("storage", nargs="?", default="runs")
    storage = location(parser.parse_args(arguments).storage)
    for name in storage.list():
        run = RunDirectory(storage.child(name))
        record = read_json(run.storage, "run.json")
        if record is None:
            continue
        result = read_json(run.storage, "result.json") or {}
        usable = survey(run).usable
        step = usable[-1].step if usable else 0
        print(f"{name:30}  step {step:>8}  {result.get('status', 'unfinished'):15}  started {record['created']}")
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
