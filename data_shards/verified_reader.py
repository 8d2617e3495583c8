"""Reading a file that a manifest lists, block by block, each block hashed before anything of it is believed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple, Protocol

import pyarrow as pa

from data_shards.errors import CorruptFile
from data_shards.fault_points import reach
from data_shards.hashed_file import DIGEST_BYTES, BlockHasher, FileEntry
from data_shards.storage import Storage

log = logging.getLogger(__name__)

SPAN_BYTES = 8 * 1024 * 1024
"""One job of a reader with many threads; a multiple of any block."""
_READ_BYTES = 1024 * 1024
"""Read and hashed at a time, so that what is hashed still lies in the processor's cache."""
_REREADS = 2
"""Of blocks that do not match their hashes: memory, a cache or the network may be at fault, and not the file."""


class Piece(NamedTuple):
    """Bytes of a file that someone wants."""

    start: int
    into: memoryview
    """writable bytes; as many as are wanted"""

    @property
    def stop(self) -> int:
        return self.start + len(self.into)


def by_span(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """The same bytes in the file's order, cut into spans that may be read side by side (pure)."""
    found: dict[int, list[Piece]] = {}
    for start, into in sorted(pieces, key=lambda piece: piece.start):
        done = 0
        while done < len(into):
            span, offset = divmod(start + done, SPAN_BYTES)
            size = min(SPAN_BYTES - offset, len(into) - done)
            found.setdefault(span, []).append(Piece(start + done, into[done : done + size]))
            done += size
    return list(found.values())


def runs_of_blocks(pieces: Sequence[Piece], block_bytes: int) -> Iterator[tuple[int, int, list[Piece]]]:
    """Blocks ``[first, stop)`` that are touched without a gap, and the pieces in them (pure).

    Args:
        pieces: in the file's order.
    """
    first, stop = 0, 0
    some: list[Piece] = []
    for piece in pieces:
        low, high = piece.start // block_bytes, -(-piece.stop // block_bytes)
        if some and low > stop:
            yield first, stop, some
            some = []
        first, stop = (first, max(stop, high)) if some else (low, high)
        some.append(piece)
    if some:
        yield first, stop, some


class VerifiedReader:
    """Random access to a file listed in a manifest; every block that is touched is hashed first, once.

    Raises CorruptFile on a wrong size or hash. May be used by many threads.
    """

    def __init__(self, storage: Storage, entry: FileEntry) -> None:
        self._where = storage.uri_of(entry.path)
        entry.check_size(storage.size(entry.path), self._where)
        self._storage = storage
        self._entry = entry
        self._file: _File = (
            _LocalFile(storage, entry) if storage.local_path is not None else _RemoteFile(storage, entry)
        )
        self._verified = bytearray(entry.num_blocks)

    def read(self, start: int, stop: int) -> bytearray:
        """Bytes ``[start, stop)``."""
        self.check_bounds(start, stop)
        found = bytearray(stop - start)
        for pieces in by_span([Piece(start, memoryview(found))]):
            self.read_span(pieces)
        return found

    def check_bounds(self, start: int, stop: int) -> None:
        """Raises CorruptFile unless the file has these bytes."""
        if not 0 <= start <= stop <= self._entry.size:
            raise CorruptFile(f"{self._where}: asked for bytes {start}-{stop} of {self._entry.size}")

    def read_span(self, pieces: Sequence[Piece]) -> None:
        """Read what is wanted of one span.

        Args:
            pieces: one of the lists that ``by_span`` gives. What lies between them in the blocks that they touch is
                read too, for the hash, unless those blocks were verified before.
        """
        for first, stop, some in runs_of_blocks(pieces, self._entry.block_bytes):
            if self._verified.find(0, first, stop) < 0:
                for piece in some:
                    self._fill(piece.start, [piece.into])
            else:
                self._read_blocks(first, stop, some)

    def blocks(self) -> Iterator[bytearray]:
        """The whole file, block by block."""
        for block in range(self._entry.num_blocks):
            yield self.read(*self._entry.block_bounds(block))

    def verify_all(self) -> None:
        step = max(1, SPAN_BYTES // self._entry.block_bytes)
        for first in range(0, self._entry.num_blocks, step):
            self._read_blocks(first, min(first + step, self._entry.num_blocks), [])

    def forget(self) -> None:
        """What this machine has of the file in memory: what is read next comes from where it is kept. Pages that some
        process has mapped stay."""
        self._file.forget()

    def _read_blocks(self, first: int, stop: int, pieces: Sequence[Piece]) -> None:
        for _ in range(_REREADS):
            try:
                return self._read_blocks_once(first, stop, pieces)
            except CorruptFile as error:
                log.warning("%s; reading it again", error)
                self.forget()
        return self._read_blocks_once(first, stop, pieces)

    def _read_blocks_once(self, first: int, stop: int, pieces: Sequence[Piece]) -> None:
        begin, end = self._entry.block_bounds(first)[0], self._entry.block_bounds(stop - 1)[1]
        digests = self._fill(begin, list(_tiled(begin, end, pieces)))
        for block in range(first, stop):
            offset = (block - first) * DIGEST_BYTES
            self._entry.check_digest(block, digests[offset : offset + DIGEST_BYTES], self._where)
        self._verified[first:stop] = bytes([1]) * (stop - first)

    def _fill(self, start: int, views: Sequence[memoryview]) -> bytes:
        """Fill ``views`` with the bytes from ``start`` on. Returns the hashes of what was read, by block."""
        return self._storage.reading(
            lambda: self._file.fill(start, views, BlockHasher(self._entry.block_bytes)), "reading", self._entry.path
        )

    def close(self) -> None:
        self._file.close()


def verify_file(storage: Storage, entry: FileEntry) -> None:
    """Read every byte of a file, from where it is kept, and not what this machine has of it in memory.

    Raises CorruptFile with what is wrong.
    """
    with closing(VerifiedReader(storage, entry)) as reader:
        reader.forget()
        reader.verify_all()


def _tiled(start: int, stop: int, pieces: Sequence[Piece]) -> Iterator[memoryview]:
    """Memory for all bytes ``[start, stop)``: the pieces', and between them some that nobody wants."""
    num_unwanted = stop - start - sum(len(piece.into) for piece in pieces)
    unwanted = memoryview(bytearray(min(_READ_BYTES, max(0, num_unwanted))))
    for piece in (*pieces, Piece(stop, memoryview(bytearray()))):
        if piece.start < start:
            raise ValueError(f"pieces overlap at byte {piece.start}")
        while start < piece.start:
            size = min(_READ_BYTES, piece.start - start)
            yield unwanted[:size]
            start += size
        yield piece.into
        start = piece.stop


class _File(Protocol):
    def fill(self, start: int, views: Sequence[memoryview], hasher: BlockHasher) -> bytes: ...
    def forget(self) -> None: ...
    def close(self) -> None: ...


class _LocalFile:
    """Not mapped: where a mapped file is cut off or its disk fails, the process dies by a signal."""

    def __init__(self, storage: Storage, entry: FileEntry) -> None:
        self._where = storage.uri_of(entry.path)
        assert storage.local_path is not None
        path = storage.local_path / entry.path
        self._descriptor = storage.reading(lambda: os.open(path, os.O_RDONLY), "opening", entry.path)

    def fill(self, start: int, views: Sequence[memoryview], hasher: BlockHasher) -> bytes:
        reach("read blocks", self._where)
        for view in views:
            for first in range(0, len(view), _READ_BYTES):
                part = view[first : first + _READ_BYTES]
                self._read(part, start)
                hasher.update(part)
                start += len(part)
        return hasher.digests()

    def _read(self, part: memoryview, start: int) -> None:
        done = 0
        while done < len(part):
            got = os.preadv(self._descriptor, [part[done:]], start + done)
            if not got:
                raise CorruptFile(f"{self._where}: ends at byte {start + done} while it is read")
            done += got

    def forget(self) -> None:
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._descriptor)


class _RemoteFile:
    """One request for all that is asked for at once."""

    def __init__(self, storage: Storage, entry: FileEntry) -> None:
        self._where = storage.uri_of(entry.path)
        self._file: pa.NativeFile = storage.open(entry.path)

    def fill(self, start: int, views: Sequence[memoryview], hasher: BlockHasher) -> bytes:
        size = sum(map(len, views))
        data = memoryview(self._file.read_at(size, start))
        if len(data) != size:
            raise CorruptFile(f"{self._where}: ends at byte {start + len(data)} while it is read")
        done = 0
        for view in views:
            view[:] = data[done : done + len(view)]
            done += len(view)
        hasher.update(data)
        return hasher.digests()

    def forget(self) -> None:
        """Nothing is kept: each request asks the store."""

    def close(self) -> None:
        self._file.close()
