"""Receipts: what says that a window is written, and where the next one begins. They are gone once the dataset's
manifest is there."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_shards import signed_json
from data_shards.audit import state as audit_state
from data_shards.audit.part import AuditLimits, AuditPart
from data_shards.errors import CorruptFile
from data_shards.manifest import ShardEntry, shards_from_json, shards_to_json
from data_shards.sources.batch import Position
from data_shards.sources.records import SourceCursor
from data_shards.storage import Storage
from data_shards.writing.tasks import Task

FOLDER = "windows"
_KIND, _VERSION = "baton-window", 2


@dataclass(frozen=True, eq=False)
class WindowSplit:
    """What a window gave to one split."""

    shards: tuple[ShardEntry, ...]
    row_counts: np.ndarray
    """int32 [R]: trained tokens of each row"""
    tokens: int
    records: int
    dropped: dict[str, int]
    truncated: int


@dataclass(frozen=True, eq=False)
class Receipt:
    """All but the window's audit, which is in the file beside it and read when all windows are there: kept in memory,
    the audits of a large corpus would be most of what preparing takes."""

    task: int
    number: int
    """of the window in its task"""
    end: SourceCursor | None
    """where the task's next window begins; None: this was its last"""
    splits: dict[str, WindowSplit]
    digests: dict[str, tuple[bytes, ...]]
    """of the records kept, by split, where repeated ones are left out"""

    @property
    def name(self) -> str:
        return f"{FOLDER}/{self.task:05d}-{self.number:05d}.json"

    def to_bytes(self, audit: AuditPart) -> bytes:
        splits = {
            name: {
                **{field: getattr(split, field) for field in ("tokens", "records", "dropped", "truncated")},
                "row_counts": split.row_counts.tolist(),
                "shards": shards_to_json(split.shards),
            }
            for name, split in self.splits.items()
        }
        end = self.end and {"file": self.end.file, "position": list(self.end.position), "rows": self.end.num_rows}
        body = {
            "task": self.task,
            "number": self.number,
            "end": end,
            "splits": splits,
            "digests": {name: _text(b"".join(found)) for name, found in self.digests.items()},
            "audit": audit_state.to_json(audit),
        }
        return signed_json.encode(body, _KIND, _VERSION)

    @classmethod
    def from_bytes(cls, data: bytes, where: str, limits: AuditLimits) -> tuple[Receipt, AuditPart]:
        """Raises CorruptFile."""
        body = signed_json.decode(data, _KIND, _VERSION, where)
        try:
            splits = {name: _split(split, where) for name, split in body["splits"].items()}
            end = body["end"] and SourceCursor(
                body["end"]["file"], Position(*body["end"]["position"]), body["end"]["rows"]
            )
            digests = {name: _digests(base64.b64decode(text)) for name, text in body["digests"].items()}
            audit = audit_state.from_json(body["audit"], limits)
            return cls(body["task"], body["number"], end, splits, digests), audit
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{where}: a field is missing or of the wrong type ({error})") from error


def _split(body: dict[str, Any], where: str) -> WindowSplit:
    shards, counts = shards_from_json(body.pop("shards"), where), np.array(body.pop("row_counts"), np.int32)
    return WindowSplit(shards, counts, **body)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _digests(data: bytes) -> tuple[bytes, ...]:
    return tuple(data[start : start + 16] for start in range(0, len(data), 16))


def read_receipts(location: Storage, limits: AuditLimits) -> dict[int, list[Receipt]]:
    """By task, in order; what a window further on left behind after a gap is not counted."""
    found: dict[int, list[Receipt]] = {}
    for name in location.list(FOLDER):
        path = f"{FOLDER}/{name}"
        try:
            receipt, _ = Receipt.from_bytes(location.read(path), location.uri_of(path), limits)
        except CorruptFile:
            continue  # done again
        chain = found.setdefault(receipt.task, [])
        if receipt.number == len(chain):
            chain.append(receipt)
    return found


def audits_of(location: Storage, receipts: Iterable[Receipt], limits: AuditLimits) -> Iterator[AuditPart]:
    """Each window's audit, read when it is asked for. Raises CorruptFile."""
    for receipt in receipts:
        yield Receipt.from_bytes(location.read(receipt.name), location.uri_of(receipt.name), limits)[1]


def in_order(receipts: dict[int, list[Receipt]], tasks: Sequence[Task]) -> Iterator[tuple[Task, Receipt]]:
    """In the order of the dataset's rows."""
    for task in tasks:
        for receipt in receipts.get(task.number, []):
            yield task, receipt


def is_done(chain: Sequence[Receipt]) -> bool:
    return bool(chain) and chain[-1].end is None
