"""What happened to a run, when and why: ``attempts/<id>/events/``, a small file each, as object stores can't append.

Driver and workers write them; ``baton status`` tells the story from them. They are for people: nothing is decided by
them, and one that can't be written is left out.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from data_shards.errors import BatonError, CorruptFile
from trainer.run_directory import RunDirectory, read_json, write_json


class EventKind(StrEnum):
    STARTED = "started"
    """the driver begins an attempt"""
    TRAINING = "training"
    """its workers are about to take their first step"""
    NOTICE = "notice"
    """somebody wants it to end: a stop, a machine that goes away, room for more workers"""
    SAVED = "saved"
    """the step at which it ended on a notice"""
    SAVE_SKIPPED = "save_skipped"
    """there was no time for that"""
    HANG = "hang"
    """no step within the time that steps take"""
    NONFINITE = "nonfinite"
    """loss or gradients were inf or NaN"""
    STRAGGLER = "straggler"
    """a rank computes more slowly than the others"""
    WAITING = "waiting"
    """its workers had to wait for room on the cluster"""
    ENDED = "ended"


@dataclass(frozen=True)
class Event:
    at: float
    """Unix seconds, by the clock of whoever wrote it"""
    kind: str
    """an ``EventKind``, or what a later release calls so"""
    text: str
    """for people, one line"""
    attempt: str
    rank: int | None = None
    """None: the driver"""
    details: Mapping[str, Any] = field(default_factory=dict)


class EventLog:
    """Writes the events of one attempt."""

    def __init__(self, run: RunDirectory, attempt: str, rank: int | None = None) -> None:
        self._folder = run.attempt(attempt).child("events")
        self._attempt = attempt
        self._rank = rank

    def record(self, kind: EventKind, text: str, /, **details: Any) -> None:
        now = time.time()
        event = Event(now, kind.value, text, self._attempt, self._rank, details)
        with suppress(OSError, BatonError):
            write_json(self._folder, f"{int(now * 1000):013d}-{kind.value}-{uuid.uuid4().hex[:12]}.json", asdict(event))


def has_trained_on_gpus(run: RunDirectory) -> bool | None:
    """Whether the newest attempt that came to train did so on GPUs; None where none has."""
    for start in reversed(run.lineage()):
        for event in read_events(run, start.attempt):
            if event.kind == EventKind.TRAINING:
                return event.details.get("device") == "cuda"
    return None


def read_events(run: RunDirectory, attempt: str) -> list[Event]:
    """Of one attempt, oldest first. Raises OSError where the storage can't be read."""
    folder = run.attempt(attempt).child("events")
    found: list[Event] = []
    for name in folder.list():
        with suppress(CorruptFile, TypeError):  # cut off, or of a later release
            if value := read_json(folder, name):
                found.append(Event(**value))
    return sorted(found, key=lambda event: event.at)
