"""``baton stop``: asks the launcher that holds a run, wherever it runs, to save and stop, through the run's storage."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # as a script: `python launch/stop.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster.claims import Claim
from cluster.holder import Life, this_process
from cluster.onlooker import Onlooker
from data_shards.errors import BadInput
from launch.cli import run_verb
from launch.exit_codes import ExitCode
from launch.which_run import run_from, run_parser
from trainer.progress_log import say
from trainer.run_directory import RunDirectory, read_json

_LONG_S = 90.0
"""After which it is told what else can be done: heartbeat, step and save mostly take less"""
_SAVED = ("stopped", "finished")


def main(arguments: Sequence[str]) -> int:
    parser = run_parser("stop")
    parser.add_argument("--no-wait", action="store_true", help="ask, and do not wait until it has stopped")
    options = parser.parse_intermixed_args(arguments)
    run = run_from(options)
    onlooker = Onlooker(run)
    hold = onlooker.who_holds()
    if hold is None:
        raise BadInput(f"{run.storage.uri}: nothing to stop, nobody holds the run ('baton status' tells how it ended)")
    before = _result(run)
    onlooker.ask_to_stop(hold.claim, f"asked to stop by {this_process()} (baton stop)")
    say(f"asked {hold.claim.holder} to save and stop; it looks with each heartbeat")
    if options.no_wait:
        return ExitCode.DONE
    return _report(run, hold.claim, before, _wait(onlooker, hold.claim))


def _wait(onlooker: Onlooker, claim: Claim) -> Life:
    if (end := onlooker.wait_for_end(claim, _LONG_S)) is not None:
        return end
    holder = claim.holder
    otherwise = f"SIGTERM to pid {holder.pid} on {holder.host}"
    if holder.job:
        otherwise += f", or `ray job stop {holder.job}`"
    say(f"still waiting: a step and a save may take their time. Otherwise: {otherwise}")
    while (end := onlooker.wait_for_end(claim, _LONG_S)) is None:
        pass
    return end


def _result(run: RunDirectory) -> dict[str, Any]:
    return read_json(run.storage, "result.json") or {}


def _has_no_last_word(run: RunDirectory, claim: Claim, result: dict[str, Any]) -> bool:
    """Whether the launcher of this claim has begun attempts that the result does not count."""
    chain = run.lineage()
    return any(start.claim == claim.id for start in chain) and result.get("attempts", 0) < len(chain)


def _report(run: RunDirectory, claim: Claim, before: dict[str, Any], end: Life) -> int:
    """How it ended, in words and as an exit code."""
    result = _result(run)
    if end == Life.DEAD:
        say("its launcher died before it could stop in order; the same command goes on from the newest checkpoint")
        return ExitCode.FAILED
    if result == before and _has_no_last_word(run, claim, result):
        say("its launcher left no result: it failed, or lost the run to another one (`baton status` tells more)")
        return ExitCode.FAILED
    if result == before:  # it had not come as far as training, or was past it
        say("stopped; nothing had to be saved")
        return ExitCode.DONE
    say(f"{result['status']} at step {result['step']}: {result['reason']}")
    return ExitCode.DONE if result["status"] in _SAVED else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
