"""Where a run lives, and which of its checkpoints count.

``run.json`` says what the run is; ``attempts/<id>/start.json`` chains the attempts; ``checkpoints/`` holds commits;
``result.json`` how it stands. Attempts that were superseded are fenced on the reader's side: whatever they commit
beyond the step at which their successor began is never read.
"""

from __future__ import annotations

import json
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from data_shards.errors import BadInput, BatonError, CorruptFile
from data_shards.storage import Storage
from trainer import checkpoint
from trainer.checkpoint import CheckpointRef
from trainer.errors import CheckpointCorrupt

Say = Callable[[str], None]


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
        raise CorruptFile(f"{storage.uri_of(relative)}: not valid JSON ({error})") from error


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


class NoUsableCheckpoint(BatonError):
    """There are commits, and none of them can be read."""


class Survey(NamedTuple):
    usable: list[CheckpointRef]
    """oldest first"""
    rejected: list[str]
    """committed, not fenced off, but damaged"""


def fences(chain: Sequence[AttemptStart]) -> dict[str, int | None]:
    """Up to which step each attempt's commits count: the earliest start of any attempt after it (pure).

    Args:
        chain: oldest first.
    """
    limits: dict[str, int | None] = {}
    limit: int | None = None
    for start in reversed(chain):
        limits[start.attempt] = limit
        limit = start.start_step if limit is None else min(limit, start.start_step)
    return limits


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

    def survey(self, report: Say = print, excluded: frozenset[str] = frozenset()) -> Survey:
        """Look at every checkpoint; what is not accepted is reported.

        Args:
            excluded: names that failed verification when they were read.
        """
        limits = fences(self.lineage())
        rejected = []

        def on_bad(name: str, problem: str) -> None:
            rejected.append(name)
            report(f"checkpoint {name} is not accepted: {problem}")

        usable = []
        for ref in checkpoint.committed(self.checkpoints, on_bad=on_bad):
            limit = limits.get(ref.manifest.attempt, -1)
            if limit is not None and ref.step > limit:
                report(f"checkpoint {ref.name} is ignored: its attempt had been superseded at step {limit}")
            elif ref.name in excluded:
                on_bad(ref.name, "it failed verification in this submission")
            else:
                usable.append(ref)
        return Survey(usable, rejected)

    def usable_checkpoints(self, report: Say = print) -> list[CheckpointRef]:
        """Committed checkpoints that may be resumed from, oldest first."""
        return self.survey(report).usable

    def newest(self, report: Say = print, excluded: frozenset[str] = frozenset()) -> CheckpointRef | None:
        """What to resume from; None where nothing was ever committed.

        Raises NoUsableCheckpoint where something was, but none of it can be accepted: starting over silently would
        fence it off for good.
        """
        usable, rejected = self.survey(report, excluded)
        if not usable and rejected:
            raise NoUsableCheckpoint(
                f"{self.storage.uri}: none of its committed checkpoints can be used ({', '.join(sorted(rejected))}; "
                "the reasons are above). If the storage was away for a moment, run the same command again; to start "
                "over, choose a new run.name or remove the checkpoints by hand"
            )
        return usable[-1] if usable else None

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
