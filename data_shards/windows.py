"""Windows: what of a corpus is packed together, committed together, and done again after a kill.

A task is a run of one source's files; its rows are encoded in order and collected until ``max_shard_tokens`` are there
or the task ends. Then they are packed and written, and last a receipt that says which shards those are and where the
next window begins. Where windows end depends on the content alone, so whoever goes on from a receipt, with any number
of processes, writes the same bytes. Receipts are gone once the dataset's manifest is there.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from data_shards import audit_state, signed_json
from data_shards.audit import AuditLimits, AuditPart, merge
from data_shards.batch_encoder import BatchJob, DropReason, EncodedBatch, SplitPart
from data_shards.config import DataConfig
from data_shards.errors import CorruptFile
from data_shards.manifest import ShardEntry, shards_from_json, shards_to_json
from data_shards.packed_tokens import PackedTokens
from data_shards.packing import pack
from data_shards.records import SourceCursor, source_batches
from data_shards.shard_writer import write_shards
from data_shards.source_batch import Position
from data_shards.source_config import SourceConfig
from data_shards.source_files import SourceFile
from data_shards.storage import Storage

FOLDER = "windows"
_KIND, _VERSION = "baton-window", 1
_TASK_BYTES = 64 << 20
"""Files are joined to tasks of about this size. Part of the format: another value makes other windows."""


class Task(NamedTuple):
    number: int
    role: str
    source: SourceConfig
    files: tuple[SourceFile, ...]


def plan_tasks(sources: Iterable[tuple[str, SourceConfig, Sequence[SourceFile]]]) -> tuple[Task, ...]:
    """Small files of a source together, a large one alone; a source with a limit is one task, because only counting
    tells where it ends."""
    tasks: list[Task] = []
    for role, source, files in sources:
        groups: list[list[SourceFile]] = []
        size = 0
        for file in files:
            if not groups or (size + file.size > _TASK_BYTES and source.limit is None):
                groups.append([])
                size = 0
            groups[-1].append(file)
            size += file.size
        tasks += [Task(len(tasks) + i, role, source, tuple(group)) for i, group in enumerate(groups)]
    return tuple(tasks)


@dataclass(frozen=True)
class WindowSplit:
    """What a window gave to one split."""

    shards: tuple[ShardEntry, ...]
    row_counts: tuple[int, ...]
    """trained tokens of each row"""
    tokens: int
    records: int
    dropped: dict[str, int]
    truncated: int


@dataclass(frozen=True)
class Receipt:
    task: int
    number: int
    """of the window in its task"""
    end: SourceCursor | None
    """where the task's next window begins; None: this was its last"""
    splits: dict[str, WindowSplit]
    digests: dict[str, tuple[bytes, ...]]
    """of the records kept, by split, where repeated ones are left out"""
    audit: AuditPart

    @property
    def name(self) -> str:
        return f"{FOLDER}/{self.task:05d}-{self.number:05d}.json"

    def to_bytes(self) -> bytes:
        splits = {
            name: {
                **{field: getattr(split, field) for field in ("tokens", "records", "dropped", "truncated")},
                "row_counts": list(split.row_counts),
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
            "audit": audit_state.to_json(self.audit),
        }
        return signed_json.encode(body, _KIND, _VERSION)

    @classmethod
    def from_bytes(cls, data: bytes, where: str, limits: AuditLimits) -> Receipt:
        """Raises CorruptFile."""
        body = signed_json.decode(data, _KIND, _VERSION, where)
        try:
            splits = {
                name: WindowSplit(shards_from_json(split.pop("shards"), where), tuple(split.pop("row_counts")), **split)
                for name, split in body["splits"].items()
            }
            end = body["end"] and SourceCursor(
                body["end"]["file"], Position(*body["end"]["position"]), body["end"]["rows"]
            )
            digests = {name: _digests(base64.b64decode(text)) for name, text in body["digests"].items()}
            audit = audit_state.from_json(body["audit"], limits)
            return cls(body["task"], body["number"], end, splits, digests, audit)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{where}: a field is missing or of the wrong type ({error})") from error


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
            receipt = Receipt.from_bytes(location.read(path), location.uri_of(path), limits)
        except CorruptFile:
            continue  # done again
        chain = found.setdefault(receipt.task, [])
        if receipt.number == len(chain):
            chain.append(receipt)
    return found


def jobs_of(task: Task, after: Sequence[Receipt]) -> Iterator[BatchJob]:
    """The task's batches that no receipt holds yet. Each but the last says where the next one begins."""
    start = after[-1].end if after else None
    if after and start is None:
        return
    for source_batch in source_batches(task.source, task.files, start):
        yield BatchJob(task.number, task.role, source_batch)


class WindowWriter:
    """Takes encoded batches in order, writes windows. One task after another."""

    def __init__(self, location: Storage, config: DataConfig, receipts: dict[int, list[Receipt]]) -> None:
        self._location = location
        self._config = config
        self._receipts = receipts
        self._open: list[EncodedBatch] = []
        self._open_tokens = 0
        self._seen: dict[str, set[bytes]] = {}
        for chain in receipts.values():
            for receipt in chain:
                for split, digests in receipt.digests.items():
                    self._seen.setdefault(split, set()).update(digests)

    def add(self, encoded: EncodedBatch) -> None:
        """The next batch of the task whose batches are open, or the first of another."""
        if self._open and self._open[-1].job.task != encoded.job.task:
            self._close(last=True)
        elif self._open_tokens >= self._config.max_shard_tokens:
            self._close(last=False)
        self._open.append(encoded)
        self._open_tokens += sum(len(part.input_ids) for part in encoded.splits.values())

    def finish(self) -> None:
        """After the last batch of the last task."""
        if self._open:
            self._close(last=True)

    def _close(self, *, last: bool) -> None:
        batches, self._open, self._open_tokens = self._open, [], 0
        task = batches[0].job.task
        chain = self._receipts.setdefault(task, [])
        splits, digests = {}, {}
        for split in sorted({name for encoded in batches for name in encoded.splits}):
            part = _joined([encoded.splits[split] for encoded in batches if split in encoded.splits])
            if self._config.cleaning.deduplicate:
                part = without_repeats(part, self._seen.setdefault(split, set()))
                digests[split] = part.digests
            written = sum(len(receipt.splits[split].shards) for receipt in chain if split in receipt.splits)
            splits[split] = self._write(part, f"{split}-{task:05d}", written)
        audit = batches[0].audit
        for encoded in batches[1:]:
            audit = merge(audit, encoded.audit)
        end = None if last else batches[-1].job.source_batch.end
        receipt = Receipt(task, len(chain), end, splits, digests, audit)
        self._location.write(receipt.name, [receipt.to_bytes()])
        chain.append(receipt)

    def _write(self, part: SplitPart, stem: str, first_shard: int) -> WindowSplit:
        packs = pack(part.lengths, self._config.seq_len, self._config.packed)
        packed = PackedTokens(part.input_ids, part.trained, np.cumsum(part.lengths) - part.lengths, packs)
        shards = tuple(write_shards(self._location, stem, packed, self._config.max_shard_tokens, first=first_shard))
        counts = tuple(packed.num_targets.tolist())
        return WindowSplit(shards, counts, len(part.input_ids), part.num_records, dict(part.dropped), part.truncated)


def _joined(parts: Sequence[SplitPart]) -> SplitPart:
    first_record = np.cumsum([0, *(part.num_records for part in parts)])
    return SplitPart(
        np.concatenate([part.input_ids for part in parts]),
        np.concatenate([part.trained for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.record_of + first for part, first in zip(parts, first_record, strict=False)]),
        tuple(digest for part in parts for digest in part.digests),
        int(first_record[-1]),
        added_up(part.dropped for part in parts),
        sum(part.truncated for part in parts),
    )


def added_up(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums by key, keys in the order in which they came."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total)


def without_repeats(part: SplitPart, seen: set[bytes]) -> SplitPart:
    """Without the records that are in ``seen`` or come a second time; ``seen`` is added to."""
    fresh = np.ones(part.num_records, bool)
    for index, digest in enumerate(part.digests):
        fresh[index] = digest not in seen
        seen.add(digest)
    kept = fresh[part.record_of]
    tokens = np.repeat(kept, part.lengths)
    repeats = int((~fresh).sum())
    dropped = dict(part.dropped) | ({DropReason.DUPLICATE.value: repeats} if repeats else {})
    return replace(
        part,
        input_ids=part.input_ids[tokens],
        trained=part.trained[tokens],
        lengths=part.lengths[kept],
        record_of=part.record_of[kept],
        digests=tuple(digest for digest, new in zip(part.digests, fresh, strict=True) if new),
        dropped=dropped,
    )


def all_receipts(receipts: dict[int, list[Receipt]], tasks: Sequence[Task]) -> Iterator[tuple[Task, Receipt]]:
    """In the order of the dataset's rows."""
    for task in tasks:
        for receipt in receipts.get(task.number, []):
            yield task, receipt


def is_done(chain: Sequence[Receipt]) -> bool:
    return bool(chain) and chain[-1].end is None
