"""One mapped shard: its record batches as numpy views, each verified when it is first touched."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_shards.as_numpy import as_numpy
from data_shards.errors import CorruptFile
from data_shards.hashed_file import BLOCK_BYTES
from data_shards.manifest import ShardEntry
from data_shards.writing.shard_writer import ROWS_PER_BATCH, SCHEMA

_TAIL_BYTES = 10
"""An Arrow file ends with the length of its footer (int32) and "ARROW1"."""
_BLOCK = np.dtype([("offset", "<i8"), ("metadata_bytes", "<i4"), ("padding", "<i4"), ("body_bytes", "<i8")])
"""Where a record batch lies: struct Block of Arrow's format/File.fbs."""


class Batch(NamedTuple):
    """One record batch of R rows, T tokens and S sequences, as views of the mapped file."""

    offsets: memoryview
    """int32 [R + 1]: row i holds tokens [offsets[i], offsets[i + 1]). A memoryview gives one number twice as fast"""
    input_ids: np.ndarray
    """int32 [T]"""
    trained: np.ndarray
    """bool [T]"""
    sequence_offsets: memoryview
    """int32 [R + 1]"""
    sequence_lengths: np.ndarray
    """int32 [S]"""
    num_trained: np.ndarray
    """int32 [R]"""


def map_file(path: Path) -> pa.Buffer:
    """The whole file, mapped. The mapping outlives its file descriptor, and the file's name.

    Raises FileNotFoundError.
    """
    if path.stat().st_size == 0:
        return pa.py_buffer(b"")
    with pa.memory_map(str(path), "r") as file:
        return file.read_buffer()


class ShardFile:
    """A mapped shard. Raises CorruptFile, naming ``where``, for whatever is not as its manifest says.

    Nothing is parsed before the blocks that hold it match their hashes.
    """

    def __init__(self, mapped: pa.Buffer, shard: ShardEntry, where: str) -> None:
        shard.file.check_size(mapped.size, where)
        self._mapped, self._shard, self._where = mapped, shard, where
        self._verified: set[int] = set()
        self.batches: list[Batch | None] = [None] * -(-shard.rows // ROWS_PER_BATCH)
        """those that were touched"""
        self._bounds = self._find_batches()
        try:
            self._file = pa.ipc.open_file(mapped)
        except (pa.ArrowException, OSError) as error:
            raise CorruptFile(f"{where}: not an Arrow file ({error})") from error
        if not self._file.schema.equals(SCHEMA) or len(self._bounds) != len(self.batches):
            raise self._wrong()

    def _wrong(self) -> CorruptFile:
        return CorruptFile(f"{self._where}: its columns or its number of rows are not what the manifest says")

    def _verify(self, start: int, stop: int) -> None:
        """Hash the blocks that hold bytes ``[start, stop)``, unless that was done."""
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            if block not in self._verified:
                first, last = self._shard.file.block_bounds(block)
                self._shard.file.check_block(block, memoryview(self._mapped)[first:last], self._where)
                self._verified.add(block)

    def _find_batches(self) -> list[tuple[int, int]]:
        """Bytes ``[start, stop)`` of each record batch, as the (verified) footer has them."""
        size = self._mapped.size
        self._verify(max(0, size - _TAIL_BYTES), size)
        view = memoryview(self._mapped)
        try:
            (footer_bytes,) = struct.unpack_from("<i", view, size - _TAIL_BYTES)
            start = size - _TAIL_BYTES - footer_bytes
            self._verify(start, size)
            found = _batch_blocks(view[start : size - _TAIL_BYTES])
        except (struct.error, ValueError, IndexError) as error:
            raise CorruptFile(f"{self._where}: not an Arrow file ({error})") from error
        stops = found["offset"] + found["metadata_bytes"] + found["body_bytes"]
        return list(zip(found["offset"].tolist(), stops.tolist(), strict=True))

    def load(self, index: int) -> Batch:
        """The record batch, verified and checked; it stays in ``batches``."""
        found = self.batches[index]
        if found is None:
            start, stop = self._bounds[index]
            if not 0 <= start <= stop <= self._mapped.size:
                raise self._wrong()
            self._verify(start, stop)
            found = self.batches[index] = self._views(index)
        return found

    def _views(self, index: int) -> Batch:
        expected = min(ROWS_PER_BATCH, self._shard.rows - index * ROWS_PER_BATCH)
        try:
            columns = self._file.get_batch(index)
            columns.validate(full=True)
        except (pa.ArrowException, OSError) as error:
            raise CorruptFile(f"{self._where}: record batch {index} can't be read ({error})") from error
        if columns.num_rows != expected or any(column.null_count for column in columns.columns):
            raise self._wrong()
        ids, trained, lengths, num_trained = columns.columns
        offsets, sequence_offsets = as_numpy(ids.offsets), as_numpy(lengths.offsets)
        flags, sizes = as_numpy(trained.values), as_numpy(lengths.values)
        bounds = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])  # [S + 1]
        if (
            not np.array_equal(offsets, as_numpy(trained.offsets))
            or not np.array_equal(bounds[sequence_offsets], offsets)
            or (flags.size and flags.max() > 1)
            or (sizes.size and sizes.min() < 1)
        ):
            raise CorruptFile(f"{self._where}: in record batch {index} the columns of a row disagree about its lengths")
        return Batch(
            offsets.data,
            as_numpy(ids.values),
            flags.view(bool),
            sequence_offsets.data,
            sizes,
            as_numpy(num_trained),
        )


def _batch_blocks(footer: memoryview) -> np.ndarray:
    """Where the record batches lie, ``_BLOCK [B]``: field 3 of the flatbuffers table Footer (Arrow's format/File.fbs).

    pyarrow reads batches by number but does not tell where they lie.
    """
    (table,) = struct.unpack_from("<I", footer, 0)
    vtable = table - struct.unpack_from("<i", footer, table)[0]
    (field,) = struct.unpack_from("<H", footer, vtable + 4 + 2 * 3)
    vector = table + field + struct.unpack_from("<I", footer, table + field)[0]
    (count,) = struct.unpack_from("<I", footer, vector)
    return np.frombuffer(footer, _BLOCK, count, offset=vector + 4)
