"""Windows: what of a corpus is packed together, committed together, and done again after a kill.

A task's rows are encoded in order, batch by batch, and collected while they fit into a shard. Then they are packed and
written, and last a receipt that says which shards those are and where the next window begins. Where windows end depends
on the content alone, so whoever goes on from a receipt, with any number of processes, writes the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from data_shards.audit.part import AuditPart, merge
from data_shards.config import DataConfig
from data_shards.sources.records import source_batches
from data_shards.storage import Storage
from data_shards.writing.batch_encoder import BatchJob, DropReason, EncodedBatch, SplitPart
from data_shards.writing.packed_tokens import PackedTokens
from data_shards.writing.packing import pack
from data_shards.writing.receipts import Receipt, WindowSplit
from data_shards.writing.shard_writer import write_shards
from data_shards.writing.tasks import Task


def jobs_of(task: Task, after: Sequence[Receipt]) -> Iterator[BatchJob]:
    """The task's batches that no receipt holds yet. Each but the last says where the next one begins."""
    start = after[-1].end if after else None
    if after and start is None:
        return
    for source_batch in source_batches(task.source, task.files, start):
        yield BatchJob(task.number, task.role, source_batch)


class _Column:
    """An array that grows at its end. Its room is kept from window to window, so that they all lie in the same memory;
    what was never written to takes none."""

    def __init__(self, dtype: type) -> None:
        self._room: np.ndarray = np.empty(1 << 20, dtype)
        self._size = 0

    def extend(self, values: np.ndarray) -> None:
        end = self._size + len(values)
        if end > len(self._room):
            larger = np.empty(max(end, 2 * len(self._room)), self._room.dtype)
            larger[: self._size] = self._room[: self._size]
            self._room = larger
        self._room[self._size : end] = values
        self._size = end

    def values(self) -> np.ndarray:
        """A view, until ``clear``."""
        return self._room[: self._size]

    def clear(self) -> None:
        self._size = 0


class _OpenSplit:
    """What the open window has for one split."""

    def __init__(self) -> None:
        self._input_ids, self._trained, self._lengths = _Column(np.int32), _Column(np.bool_), _Column(np.int64)
        self.clear()

    def clear(self) -> None:
        for column in (self._input_ids, self._trained, self._lengths):
            column.clear()
        self._records = self._truncated = 0
        self._dropped: Counter[str] = Counter()
        self.digests: list[bytes] = []
        self.is_open = False

    def add(self, part: SplitPart) -> None:
        self.is_open = True
        self._input_ids.extend(part.input_ids)
        self._trained.extend(part.trained)
        self._lengths.extend(part.lengths)
        self._records += part.num_records
        self._truncated += part.truncated
        self._dropped.update(part.dropped)
        self.digests += part.digests

    def write(self, location: Storage, config: DataConfig, stem: str, first_shard: int) -> WindowSplit:
        lengths = self._lengths.values()
        packs = pack(lengths, config.seq_len, config.packed)
        ids, trained = self._input_ids.values(), self._trained.values()
        packed = PackedTokens(ids, trained, np.cumsum(lengths) - lengths, packs)
        shards = tuple(write_shards(location, stem, packed, config.shard_tokens, first=first_shard))
        counts = packed.num_targets.astype(np.int32)
        return WindowSplit(shards, counts, len(ids), self._records, dict(self._dropped), self._truncated)


class WindowWriter:
    """Takes encoded batches in order, writes windows. One task after another."""

    def __init__(self, location: Storage, config: DataConfig, receipts: dict[int, list[Receipt]]) -> None:
        self._location = location
        self._config = config
        self._receipts = receipts
        self._last: BatchJob | None = None
        """of the open window, which is empty where there is none"""
        self._tokens = 0
        self._splits: dict[str, _OpenSplit] = {}
        self._audit: AuditPart | None = None
        self._seen: dict[str, set[bytes]] = {}
        for chain in receipts.values():
            for receipt in chain:
                for split, digests in receipt.digests.items():
                    self._seen.setdefault(split, set()).update(digests)

    def add(self, encoded: EncodedBatch) -> None:
        """The next batch of the task whose window is open, or the first of another."""
        tokens = sum(len(part.input_ids) for part in encoded.splits.values())
        if self._last and self._last.task != encoded.job.task:
            self._close(last=True)
        elif self._last and self._tokens + tokens > self._config.shard_tokens:
            self._close(last=False)
        self._last = encoded.job
        self._audit = encoded.audit if self._audit is None else merge(self._audit, encoded.audit)
        self._tokens += tokens
        for split, part in encoded.splits.items():
            if self._config.cleaning.deduplicate:
                part = without_repeats(part, self._seen.setdefault(split, set()))
            self._splits.setdefault(split, _OpenSplit()).add(part)

    def finish(self) -> None:
        """After the last batch of the last task."""
        if self._last:
            self._close(last=True)

    def _close(self, *, last: bool) -> None:
        assert self._last and self._audit
        task = self._last.task
        chain = self._receipts.setdefault(task, [])
        splits, digests = {}, {}
        for name, split in sorted(self._splits.items()):
            if not split.is_open:
                continue
            first_shard = sum(len(receipt.splits[name].shards) for receipt in chain if name in receipt.splits)
            splits[name] = split.write(self._location, self._config, f"{name}-{task:05d}", first_shard)
            if self._config.cleaning.deduplicate:
                digests[name] = tuple(split.digests)
            split.clear()
        end = None if last else self._last.source_batch.end
        receipt = Receipt(task, len(chain), end, splits, digests)
        self._location.write(receipt.name, [receipt.to_bytes(self._audit)])
        chain.append(receipt)
        self._last, self._audit, self._tokens = None, None, 0


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
