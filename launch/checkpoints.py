"""``baton checkpoints list|verify RUN``: what is committed, and whether every byte is as written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # as a script: `python launch/checkpoints.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_shards.errors import BadInput, CorruptFile
from launch.cli import VERBS, run_verb
from launch.exit_codes import ExitCode
from launch.runs import location
from trainer import checkpoint
from trainer.errors import CheckpointOutOfReach
from trainer.run_directory import RunDirectory
from trainer.survey import lines_of, release, survey


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="baton checkpoints", description=VERBS["checkpoints"])
    parser.add_argument("action", choices=("list", "verify"))
    parser.add_argument("run", help="the run's folder, <storage>/<name>")
    options = parser.parse_args(arguments)
    run = RunDirectory(location(options.run))
    if not run.storage.exists("run.json"):
        raise BadInput(f"{run.storage.uri}: no run there (no run.json)")
    return _list(run) if options.action == "list" else _verify(run)


def _list(run: RunDirectory) -> int:
    found = survey(run)
    for ref in found.usable:
        manifest = ref.manifest
        size = sum(entry.size for entry in manifest.files)
        loss = f"{manifest.progress.last_loss:.4f}" if manifest.progress.last_loss is not None else "-"
        where = f"  on the nodes, in {manifest.files_at}" if manifest.fast else ""
        print(
            f"step {ref.step:>8}  {manifest.created}  W={manifest.world_size}  {size:,} bytes  loss {loss}  "
            f"{ref.name}{where}"
        )
    for line in lines_of(found):
        print(line)
    return ExitCode.DONE


def _verify(run: RunDirectory) -> int:
    bad = 0
    for name in run.checkpoints.list():
        try:
            ref = checkpoint.verify(run.checkpoints, name)
            released = "; it may be used again" if release(run, name) else ""
            print(f"good  {name}  {sum(entry.size for entry in ref.manifest.files):,} bytes{released}")
        except FileNotFoundError:
            print(f"none  {name}  never committed (no manifest)")
        except CheckpointOutOfReach as error:
            print(f"away  {name}  {error}")
        except CorruptFile as error:
            bad += 1
            print(f"BAD   {name}  {error}")
    return ExitCode.FAILED if bad else ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
