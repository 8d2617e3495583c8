"""``baton status``: the story of a run on one screen."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # as a script: `python launch/status.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cluster.onlooker import Onlooker
from cluster.story import tell
from cluster.story_facts import RunRecord, read_run, unix
from launch.cli import run_verb
from launch.exit_codes import ExitCode
from launch.story_text import Durable, Told, lines_of
from launch.which_run import run_from, run_parser
from trainer.run_directory import RunDirectory


def look(run: RunDirectory) -> Told:
    """Raises OSError where the storage can't be read."""
    hold = Onlooker(run).who_holds()
    record = read_run(run, hold.claim if hold else None)
    return Told(
        uri=run.storage.uri,
        now=record.facts.now,
        story=tell(record.facts),
        num_steps=record.num_steps,
        held_by=str(hold.claim) if hold else None,
        silent=hold is not None and not hold.alive,
        reason=record.result.get("reason", ""),
        written=record.result.get("written", ""),
        durable=_newest_durable(record),
    )


def _newest_durable(record: RunRecord) -> Durable | None:
    durable = [ref for ref in record.usable if not ref.manifest.fast]
    return Durable(durable[-1].name, durable[-1].step, unix(durable[-1].manifest.created)) if durable else None


def as_json(told: Told) -> dict[str, Any]:
    """For scripts: everything that the text says, and every attempt and event; times are Unix seconds."""
    totals = told.story.totals
    value = asdict(told)
    value["story"]["totals"] |= {"other_s": totals.other_s, "goodput": totals.goodput}
    return value


def main(arguments: Sequence[str]) -> int:
    parser = run_parser("status")
    parser.add_argument("--json", action="store_true", help="all of it, for scripts")
    parser.add_argument("--all", action="store_true", help="every attempt and event, however many")
    options = parser.parse_intermixed_args(arguments)
    told = look(run_from(options))
    print(json.dumps(as_json(told), indent=1) if options.json else "\n".join(lines_of(told, everything=options.all)))
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:]))
