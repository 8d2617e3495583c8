"""Where a run lives, and which attempts made it.

``run.json`` says what the run is; ``attempts/<id>/start.json`` chains the attempts; ``checkpoints/`` holds commits
(``survey.py`` says which count); ``result.json`` how it stands. Attempts that were superseded are fenced on the
reader's side: whatever they commit beyond the step at which their successor began is never read; nor is anything of
attempts that are not in the chain that counts, such as those which a launcher starts after another one took the run
over.
"""

from __future__ import annotations

import json
import os
import socket
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from data_shards.errors import BadInput, BatonError, CorruptFile, DatasetCorrupt
from data_shards.storage import Storage
from trainer.checkpoint import CheckpointRef
from trainer.errors import CheckpointCorrupt, CheckpointUnusable, DiskFull, RunHeld

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


class StopKind(StrEnum):
    """Why an attempt is to save and end."""

    STOP = "stop"
    """the run is to stop"""
    PREEMPTED = "preempted"
    """a machine under it will be taken away; the run goes on elsewhere"""
    RESIZE = "resize"
    """there is room for more workers"""
    SUPERSEDED = "superseded"
    """another attempt goes on in its place: it should never have lived so long, and removes nothing any more"""


@dataclass(frozen=True)
class StopRequest:
    """``attempts/<id>/stop.json``."""

    reason: str
    kind: StopKind = StopKind.STOP
    deadline: float | None = None
    """Unix seconds until which there is time"""


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
    term: int = 0
    """of the launcher's hold on the run (cluster/claims.py); 0: from before there were any"""
    claim: str = ""
    """id of that hold"""
    num_workers: int = 0
    """0: from before it was written down, or under torchrun"""

    @property
    def launcher_rank(self) -> tuple[int, str]:
        """Of two launchers' attempts those with the lower one count."""
        return -self.term, self.claim


@dataclass(frozen=True)
class WorkerError:
    """What a rank left behind when it failed."""

    rank: int
    type: str
    message: str
    retryable: bool
    bad_input: bool
    disk_full: bool = False
    checkpoint: str | None = None
    """the one that turned out unusable"""
    corrupt: bool = False
    """it did not read back as written"""
    data_file: str | None = None
    """of the prepared dataset, the one that did not"""
    traceback: str = ""
    step: int | None = None
    """the one that it was about; None before the first"""
    suspects: tuple[int, ...] = ()
    """ranks that held the others up, where the error is about that"""
    recurs: bool = False
    """the same step gives it again, unless it was a machine's fault: one more attempt tells"""

    @classmethod
    def of(
        cls, rank: int, error: BaseException, *, step: int | None = None, suspects: tuple[int, ...] = ()
    ) -> WorkerError:
        return cls(
            rank=rank,
            type=type(error).__name__,
            message="; ".join([str(error), *getattr(error, "__notes__", ())]),
            retryable=error.retryable if isinstance(error, BatonError) else True,
            bad_input=isinstance(error, BadInput),
            disk_full=isinstance(error, DiskFull),
            checkpoint=error.checkpoint if isinstance(error, CheckpointUnusable) else None,
            corrupt=isinstance(error, CheckpointCorrupt),
            data_file=error.file if isinstance(error, DatasetCorrupt) else None,
            traceback="".join(traceback.format_exception(error)),
            step=step,
            suspects=suspects,
            recurs=getattr(error, "recurs", False),
        )


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


def lineage_of(starts: Mapping[str, AttemptStart]) -> list[AttemptStart]:
    """The chain of attempts that counts, oldest first: of the launcher that took the run last the longest (pure).

    A launcher that goes on without knowing that it was superseded makes the older term's chain longer, but no younger.
    Of equal terms, which launchers do not get, the lower claim counts, and always the same.
    """
    if not starts:
        return []
    return chain_to(min(starts.values(), key=lambda s: (s.launcher_rank, -s.number, s.attempt)), starts)


def chain_to(tip: AttemptStart | None, starts: Mapping[str, AttemptStart]) -> list[AttemptStart]:
    """An attempt and all before it, by their parents, oldest first (pure)."""
    chain: list[AttemptStart] = []
    while tip is not None:
        chain.append(tip)
        tip = starts.get(tip.parent) if tip.parent else None
    return chain[::-1]


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
        self,
        parent: AttemptStart | None,
        resume_from: CheckpointRef | None,
        allowed_changes: tuple[str, ...],
        *,
        term: int = 0,
        claim: str = "",
        num_workers: int = 0,
    ) -> AttemptStart:
        """Write it, then look. Raises RunHeld where another launcher's attempts count by now: no worker may start."""
        start = AttemptStart(
            attempt=uuid.uuid4().hex[:12],
            parent=parent.attempt if parent else None,
            number=parent.number + 1 if parent else 1,
            start_step=resume_from.step if resume_from else 0,
            started=utc_now(),
            resume_from=resume_from.name if resume_from else None,
            allowed_changes=allowed_changes,
            term=term,
            claim=claim,
            num_workers=num_workers,
        )
        write_json(self.attempt(start.attempt), "start.json", asdict(start))
        tip = self.lineage()[-1:]
        if tip and tip[0].launcher_rank < start.launcher_rank:
            raise RunHeld(
                f"{self.storage.uri}: attempt {tip[0].attempt} of another launcher counts, started {tip[0].started}: "
                "this launcher has lost the run"
            )
        return start

    def attempts(self) -> dict[str, AttemptStart]:
        """All that were ever started, by id."""
        starts = {}
        for name in self.storage.child("attempts").list():
            if value := read_json(self.attempt(name), "start.json"):
                starts[name] = AttemptStart(**value | {"allowed_changes": tuple(value["allowed_changes"])})
        return starts

    def last_term(self) -> int:
        """The greatest under which an attempt was started."""
        return max((start.term for start in self.attempts().values()), default=0)

    def lineage(self) -> list[AttemptStart]:
        """The chain of attempts that counts, oldest first."""
        return lineage_of(self.attempts())

    def lineage_to(self, attempt: str) -> list[AttemptStart]:
        """An attempt and those that it goes back to, oldest first; of one that is not there yet, as a listing may lag,
        none."""
        starts = self.attempts()
        return chain_to(starts.get(attempt), starts)

    def errors_of(self, attempt: str) -> list[WorkerError]:
        """Without those that are cut off: their writer was killed, and so need not say why."""
        folder = self.attempt(attempt).child("errors")
        found = []
        for name in folder.list():
            with suppress(CorruptFile):
                if value := read_json(folder, name):
                    found.append(WorkerError(**value | {"suspects": tuple(value.get("suspects", ()))}))
        return found

    def write_error(self, attempt: str, error: WorkerError) -> None:
        write_json(self.attempt(attempt), f"errors/rank-{error.rank:05d}.json", asdict(error))

    def request_stop(
        self, attempt: str, reason: str, kind: StopKind = StopKind.STOP, deadline: float | None = None
    ) -> None:
        """Have an attempt save and end.

        Args:
            deadline: Unix seconds at which its workers, or some of them, will be gone.
        """
        request = {"reason": reason, "at": utc_now(), "kind": kind.value, "deadline": deadline}
        write_json(self.attempt(attempt), "stop.json", request)

    def stop_request(self, attempt: str) -> StopRequest | None:
        """What was asked of an attempt, last."""
        try:
            value = read_json(self.attempt(attempt), "stop.json")
        except CorruptFile:
            value = {}  # somebody wants something
        if value is None:
            return None
        kind = value.get("kind", StopKind.STOP)
        known = kind in set(StopKind)
        return StopRequest(value.get("reason", ""), StopKind(kind) if known else StopKind.STOP, value.get("deadline"))

    def write_place(self, attempt: str, rank: int, node: str) -> None:
        """Leave word where a rank runs."""
        place = {"node": node, "host": socket.gethostname(), "pid": os.getpid(), "at": utc_now()}
        write_json(self.attempt(attempt).child("workers"), f"rank-{rank:05d}.json", place)

    def nodes_of(self, attempt: str) -> dict[int, str]:
        """What the driver calls the machines of those ranks that have left word."""
        folder = self.attempt(attempt).child("workers")
        found: dict[int, str] = {}
        for name in folder.list():
            with suppress(CorruptFile):  # another kill, another file that was cut off
                if value := read_json(folder, name):
                    found[int(name.removeprefix("rank-").removesuffix(".json"))] = value["node"]
        return found

    def notify(self, attempt: str, rank: int, node: str, request: StopRequest) -> None:
        """Leave word for the driver that a rank's machine will be taken away, for which all are going to stop."""
        write_json(self.attempt(attempt).child("notices"), f"rank-{rank:05d}.json", asdict(request) | {"node": node})

    def notices(self, attempt: str) -> dict[str, StopRequest]:
        """Such words, by the machine that they are about; without those that were cut off when it went."""
        folder = self.attempt(attempt).child("notices")
        found: dict[str, StopRequest] = {}
        for name in folder.list():
            with suppress(CorruptFile):
                if value := read_json(folder, name):
                    request = StopRequest(value["reason"], StopKind(value["kind"]), value["deadline"])
                    found[value["node"]] = request
        return found
