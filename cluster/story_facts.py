"""Reads what ``cluster.story`` tells, from a run's folder only: of a run that trains right now as well, whose files may
be half there, and on an object store too."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

from cluster.claims import Claim
from cluster.doing import read_doing
from cluster.failures import EndKind, root_cause
from cluster.story import AttemptFacts, Facts, StepDone
from data_shards.errors import CorruptFile
from trainer.checkpoint import CheckpointRef, parse_name
from trainer.events import read_events
from trainer.progress_log import SO_FAR, STEPS
from trainer.run_directory import AttemptStart, RunDirectory, read_json
from trainer.survey import survey

_READERS = 16
"""Threads: an object store takes its time for each of many small files, but answers many requests at once."""


class RunRecord(NamedTuple):
    """What ``baton status`` needs beside the story itself."""

    facts: Facts
    usable: list[CheckpointRef]
    """oldest first"""
    num_steps: int | None
    """at which the run ends, where that is known already"""
    result: Mapping[str, Any]
    """``result.json``, empty where there is none"""


def read_run(run: RunDirectory, held_by: Claim | None) -> RunRecord:
    """Raises OSError where the storage can't be read."""
    recorded, result = _read(run, "run.json"), _read(run, "result.json")
    found = survey(run)
    committed = _committed(found.usable, list(found.attempts.values()))
    workers = {ref.manifest.attempt: ref.manifest.world_size for ref in found.usable}
    configured = recorded.get("config", {}).get("cluster", {}).get("num_workers")
    with ThreadPoolExecutor(_READERS) as pool:
        read = pool.map(lambda start: _Attempt(run, start), found.attempts.values())
        attempts = {each.start.attempt: each for each in read}
    newest = found.chain[-1].attempt if found.chain else None
    facts = Facts(
        attempts={
            name: attempt.facts(committed.get(name), workers.get(name) or (configured if name == newest else None))
            for name, attempt in attempts.items()
        },
        now=time.time(),
        newest_step=found.usable[-1].step if found.usable else 0,
        held_by=held_by.id if held_by else None,
        result=result.get("status"),
        result_attempts=result.get("attempts", 0),
        result_by=result.get("claim"),
        doing=read_doing(run),
    )
    num_steps = _num_steps([attempts[start.attempt] for start in found.chain], result, recorded)
    return RunRecord(facts, found.usable, num_steps, result)


def unix(written: str) -> float:
    """Seconds, of a time as Baton writes it into its files."""
    return datetime.fromisoformat(written).timestamp()


def _read(run: RunDirectory, relative: str) -> dict[str, Any]:
    """Empty where it is not there, or not readable as JSON."""
    with suppress(CorruptFile):
        value = read_json(run.storage, relative)
        return value if isinstance(value, dict) else {}
    return {}


def _committed(usable: Sequence[CheckpointRef], starts: Sequence[AttemptStart]) -> dict[str, int]:
    """By attempt the newest step that it committed: those that are still there, and those with which others began."""
    names = [ref.name for ref in usable] + [start.resume_from for start in starts if start.resume_from]
    found: dict[str, int] = {}
    for step, attempt in map(parse_name, names):
        found[attempt] = max(step, found.get(attempt, 0))
    return found


def _num_steps(chain: Sequence[_Attempt], result: Mapping[str, Any], recorded: Mapping[str, Any]) -> int | None:
    """As the last attempt that did a step says, else its last submission, else its configuration."""
    told = next((attempt.num_steps for attempt in reversed(chain) if attempt.num_steps), None)
    return told or result.get("num_steps") or recorded.get("config", {}).get("training", {}).get("steps")


class _Attempt:
    """The files of one attempt, read."""

    def __init__(self, run: RunDirectory, start: AttemptStart) -> None:
        self.start = start
        folder = f"attempts/{start.attempt}"
        self._decision, self._end = _read(run, f"{folder}/decision.json"), _read(run, f"{folder}/end.json")
        self._error = root_cause(run.errors_of(start.attempt))
        self._events = tuple(read_events(run, start.attempt))
        self._records = list(_records(run, start.attempt))

    @property
    def num_steps(self) -> int | None:
        return next((int(record["num_steps"]) for record in reversed(self._records) if "num_steps" in record), None)

    def facts(self, committed: int | None, num_workers: int | None) -> AttemptFacts:
        counted = [event.details["num_workers"] for event in self._events if "num_workers" in event.details]
        ends = [event.at for event in self._events if event.kind == "ended"]
        written = [unix(value["at"]) for value in (self._end, self._decision) if "at" in value]
        return AttemptFacts(
            start=self.start,
            started=unix(self.start.started),
            steps=[StepDone(record["step"], record["seconds"], record.get("time", 0.0)) for record in self._records],
            events=self._events,
            ended=next(iter(ends + written), None),
            outcome=self._outcome(),
            reason=self._reason(),
            committed_step=max(filter(None, [committed, self._end.get("progress", {}).get("step")]), default=None),
            num_workers=counted[-1] if counted else self.start.num_workers or num_workers,
        )

    def _outcome(self) -> str | None:
        found = self._decision.get("end", {}).get("kind") or self._end.get("outcome")
        return found or (EndKind.FAILED.value if self._error else None)

    def _reason(self) -> str:
        if reason := self._decision.get("decision", {}).get("reason"):
            return str(reason)
        ended = [event.text for event in self._events if event.kind == "ended"]
        if ended:
            return ended[-1]
        return f"{self._error.type}: {self._error.message}" if self._error else ""


def _records(run: RunDirectory, attempt: str) -> Iterator[dict[str, Any]]:
    """Step records, those that were written at commits last: what was written in between may be older."""
    folder = run.attempt(attempt)
    for name in [SO_FAR, *(f"{STEPS}/{name}" for name in folder.list(STEPS))]:
        with suppress(FileNotFoundError):
            for line in folder.read(name).splitlines():
                with suppress(ValueError, KeyError, TypeError):  # cut off, or of a later release
                    record = json.loads(line)
                    yield record | {"step": int(record["step"]), "seconds": float(record["seconds"])}
