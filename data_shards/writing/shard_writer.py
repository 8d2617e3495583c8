"""Packs to Arrow IPC files.

Columns, one row per pack: ``input_ids`` list<int32>, ``trained`` list<uint8> of the same lengths, ``sequence_lengths``
list<int32> summing to them, ``num_trained`` int32. Record batches hold ``ROWS_PER_BATCH`` rows (the last may be
shorter), so that a row's place is arithmetic.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from data_shards.manifest import ShardEntry
from data_shards.storage import Storage
from data_shards.writing.packed_tokens import PackedTokens

ROWS_PER_BATCH = 256
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.uint8())),
        ("sequence_lengths", pa.list_(pa.int32())),
        ("num_trained", pa.int32()),
    ]
)


def _list_array(offsets: np.ndarray, values: np.ndarray, dtype: type) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values.astype(dtype)))


def _record_batch(packed: PackedTokens, first: int, last: int) -> pa.RecordBatch:
    rows = packed.rows(first, last)
    return pa.RecordBatch.from_arrays(
        [
            _list_array(rows.offsets, rows.input_ids, np.int32),
            _list_array(rows.offsets, rows.trained, np.uint8),
            _list_array(rows.sequence_offsets, rows.sequence_lengths, np.int32),
            pa.array(packed.num_targets[first:last].astype(np.int32)),
        ],
        schema=SCHEMA,
    )


class _Taken(io.RawIOBase):
    """Takes what is written, and gives it away."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._chunks.append(bytes(data))
        self._size += len(data)
        return len(data)

    def tell(self) -> int:
        return self._size

    def given(self) -> list[bytes]:
        chunks, self._chunks = self._chunks, []
        return chunks


@dataclass(frozen=True)
class _ShardBytes:
    """The file of the rows ``[first, last)`` in chunks, made as they are asked for: each time anew, should an upload
    begin again."""

    packed: PackedTokens
    first: int
    last: int

    def __iter__(self) -> Iterator[bytes]:
        sink = _Taken()
        with pa.ipc.new_file(sink, SCHEMA) as writer:
            for start in range(self.first, self.last, ROWS_PER_BATCH):
                writer.write_batch(_record_batch(self.packed, start, min(start + ROWS_PER_BATCH, self.last)))
                yield from sink.given()
        yield from sink.given()


def _shard_bounds(num_tokens: np.ndarray, max_shard_tokens: int) -> list[int]:
    """Shard i holds the rows ``[bounds[i], bounds[i + 1])``: as many as fit, at least one. ``num_tokens`` ``[R]``."""
    ends = np.cumsum(num_tokens)
    bounds = [0]
    before = 0
    while bounds[-1] < len(ends):
        fitting = int(np.searchsorted(ends, before + max_shard_tokens, side="right"))
        bounds.append(max(fitting, bounds[-1] + 1))
        before = int(ends[bounds[-1] - 1])
    return bounds


def write_shards(
    storage: Storage, stem: str, packed: PackedTokens, max_shard_tokens: int, *, first: int = 0
) -> Iterator[ShardEntry]:
    """Write ``<stem>-00000.arrow`` (or from number ``first`` on) and so on, and yield their manifest entries."""
    bounds = _shard_bounds(packed.num_tokens, max_shard_tokens)
    for number, (start, stop) in enumerate(pairwise(bounds), first):
        yield ShardEntry(storage.write(f"{stem}-{number:05d}.arrow", _ShardBytes(packed, start, stop)), stop - start)
