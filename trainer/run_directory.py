"""Where a run lives, and which of its checkpoints count.

``run.json`` says what the run is; ``attempts/<id>/start.json`` chains the attempts; ``checkpoints/`` holds commits;
``result.json`` how it stands. Attempts that were superseded are fenced on the reader's side: whatever they commit
beyond the step at which their successor began is never read.
"""

from __future__ import annotations

import json
import traceback
import uuid
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from data_shards.errors import BadInput, BatonError, CorruptFile
from data_shards.storage import Storage
from trainer import checkpoint
from trainer.checkpoint import CheckpointRef
from trainer.errors import CheckpointCorrupt


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_json(storage: Storage, relative: str, value: Any) -> None:
    storage.write(relative, [json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"])


def read_json(storage: Storage, relative: str) -> Any:
    """None where there is no such file. Raises CorruptFile where it is not JSON."""
    try:
        return json.loads(storage.read(relative))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CorruptFile(f"{storage.uri}/{relative}: not valid JSON ({error})") from error


@dataclass(frozen=True)
class AttemptStart:
    """``attempts/<id>/start.json``."""

    attempt: str
    parent: str | None
    number: int
    """1 for the first"""
    start_step: int
    started: str
    resume_from: str | None
    allowed_changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WorkerError:
    """What a rank left behind when it failed."""

    rank: int
    type: str
    message: str
    retryable: bool
    bad_input: bool
    checkpoint: str | None = None
    """the one that turned out corrupt"""
    traceback: str = ""

    @classmethod
    def of(cls, rank: int, error: BaseException) -> WorkerError:
        return cls(
            rank=rank,
            type=type(error).__name__,
            message=str(error),
            retryable=error.retryable if isinstance(error, BatonError) else True,
            bad_input=isinstance(error, BadInput),
            checkpoint=error.checkpoint if isinstance(error, CheckpointCorrupt) else None,
            traceback="".join(traceback.format_exception(error)),
        )


class RunDirectory:
    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.checkpoints = storage.child("checkpoints")

    @classmethod
    def at(cls, uri: str) -> RunDirectory:
        return cls(Storage.at(uri))

    def attempt(self, attempt: str) -> Storage:
        return self.storage.child(f"attempts/{attempt}")

    def start_attempt(
        self, parent: AttemptStart | None, resume_from: CheckpointRef | None, allowed_changes: tuple[str, ...]
    ) -> AttemptStart:
        start = AttemptStart(
            attempt=uuid.uuid4().hex[:12],
            parent=parent.attempt if parent else None,
            number=parent.number + 1 if parent else 1,
            start_step=resume_from.step if resume_from else 0,
            started=utc_now(),
            resume_from=resume_from.name if resume_from else None,
            allowed_changes=allowed_changes,
        )
        write_json(self.attempt(start.attempt), "start.json", asdict(start))
        return start

    def lineage(self) -> list[AttemptStart]:
        """The chain of attempts that counts, oldest first: the longest, and of equals the one with the lowest id."""
        starts = {}
        for name in self.storage.child("attempts").list():
            if value := read_json(self.attempt(name), "start.json"):
                starts[name] = AttemptStart(**value | {"allowed_changes": tuple(value["allowed_changes"])})
        if not starts:
            return []
        tip: AttemptStart | None = min(starts.values(), key=lambda start: (-start.number, start.attempt))
        chain: list[AttemptStart] = []
        while tip is not None:
            chain.append(tip)
            tip = starts.get(tip.parent) if tip.parent else None
        return chain[::-1]

    def usable_checkpoints(self, report: Any = print, excluded: frozenset[str] = frozenset()) -> list[CheckpointRef]:
        """Committed checkpoints that may be resumed from, oldest first; what is not accepted is reported."""
        chain = self.lineage()
        limits: dict[str, int | None] = {before.attempt: after.start_step for before, after in pairwise(chain)}
        limits |= {start.attempt: None for start in chain[-1:]}

        def on_bad(name: str, problem: str) -> None:
            report(f"checkpoint {name} is not accepted: {problem}")

        found = []
        for ref in checkpoint.committed(self.checkpoints, on_bad=on_bad):
            limit = limits.get(ref.manifest.attempt, -1)
            if ref.name in excluded:
                report(f"checkpoint {ref.name} is left out: it failed verification in this submission")
            elif limit is not None and ref.step > limit:
                report(f"checkpoint {ref.name} is ignored: its attempt had been superseded at step {limit}")
            else:
                found.append(ref)
        return found

    def errors_of(self, attempt: str) -> list[WorkerError]:
        folder = self.attempt(attempt).child("errors")
        return [WorkerError(**value) for name in folder.list() if (value := read_json(folder, name))]

    def write_error(self, attempt: str, error: WorkerError) -> None:
        write_json(self.attempt(attempt), f"errors/rank-{error.rank:05d}.json", asdict(error))

    def request_stop(self, attempt: str, reason: str) -> None:
        write_json(self.attempt(attempt), "stop.json", {"reason": reason, "at": utc_now()})

    def stop_requested(self, attempt: str) -> bool:
        return self.attempt(attempt).exists("stop.json")

    def prune(self, keep_last: int) -> list[str]:
        """Remove committed checkpoints but the newest ``keep_last``, manifest first so that none is ever half there."""
        removed = [ref.name for ref in self.usable_checkpoints(report=lambda line: None)[:-keep_last]]
        for name in removed:
            self.checkpoints.child(name).delete_file(checkpoint.MANIFEST)
            self.checkpoints.delete_tree(name)
        return removed
