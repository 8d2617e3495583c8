"""Packs to Arrow IPC files.

Columns, one row per pack: ``input_ids`` list<int32>, ``trained`` list<uint8> of the same lengths, ``sequence_lengths``
list<int32> summing to them, ``num_trained`` int32. Record batches hold ``ROWS_PER_BATCH`` rows (the last may be
shorter), so that a row's place is arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from data_shards.manifest import ShardEntry
from data_shards.pack import Sequence
from data_shards.storage import Storage

ROWS_PER_BATCH = 256
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("trained", pa.list_(pa.uint8())),
        ("sequence_lengths", pa.list_(pa.int32())),
        ("num_trained", pa.int32()),
    ]
)


def _list_array(parts: list[np.ndarray], dtype: type) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(parts).astype(dtype)))


def _record_batch(packs: list[list[Sequence]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [
            _list_array([np.concatenate([s.input_ids for s in pack]) for pack in packs], np.int32),
            _list_array([np.concatenate([s.trained for s in pack]) for pack in packs], np.uint8),
            _list_array([np.array([len(s.input_ids) for s in pack]) for pack in packs], np.int32),
            pa.array([sum(s.num_targets for s in pack) for pack in packs], pa.int32()),
        ],
        schema=SCHEMA,
    )


def _shard_bytes(packs: list[list[Sequence]]) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        for start in range(0, len(packs), ROWS_PER_BATCH):
            writer.write_batch(_record_batch(packs[start : start + ROWS_PER_BATCH]))
    return sink.getvalue()


def write_shards(
    storage: Storage, stem: str, packs: Iterable[list[Sequence]], max_shard_tokens: int, *, first: int = 0
) -> Iterator[ShardEntry]:
    """Write ``<stem>-00000.arrow`` (or from number ``first`` on) and so on, and yield their manifest entries."""
    pending: list[list[Sequence]] = []
    tokens, number = 0, first
    for pack in packs:
        size = sum(len(sequence.input_ids) for sequence in pack)
        if pending and tokens + size > max_shard_tokens:
            yield ShardEntry(storage.write(f"{stem}-{number:05d}.arrow", [_shard_bytes(pending)]), len(pending))
            pending, tokens, number = [], 0, number + 1
        pending.append(pack)
        tokens += size
    if pending:
        yield ShardEntry(storage.write(f"{stem}-{number:05d}.arrow", [_shard_bytes(pending)]), len(pending))
