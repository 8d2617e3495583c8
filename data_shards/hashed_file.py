"""A file as a manifest lists it: its size and the hashes of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import xxhash

from data_shards.errors import CorruptFile

BLOCK_BYTES = 8 * 1024 * 1024
"""Hashes are kept per block, so that a reader verifies just the blocks that it touches."""
DIGEST_BYTES = 16


@dataclass(frozen=True)
class FileEntry:
    """A file as its manifest lists it."""

    path: str
    """relative to the manifest's directory"""
    size: int
    """bytes"""
    digests: bytes
    """xxh3-128 of each block, one after the other"""
    block_bytes: int = BLOCK_BYTES

    def to_json(self) -> dict[str, Any]:
        """Of a file in blocks of the usual size."""
        return {"path": self.path, "size": self.size, "block_hashes": list(self.block_hashes)}

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> FileEntry:
        """Raises CorruptFile where the path would leave the directory of ``where``, the manifest."""
        path = inside(str(value["path"]), where)
        return cls(path, int(value["size"]), bytes.fromhex("".join(map(str, value["block_hashes"]))))

    @property
    def num_blocks(self) -> int:
        return -(-self.size // self.block_bytes)

    @property
    def block_hashes(self) -> tuple[str, ...]:
        """In hex."""
        starts = range(0, len(self.digests), DIGEST_BYTES)
        return tuple(self.digests[start : start + DIGEST_BYTES].hex() for start in starts)

    def block_bounds(self, block: int) -> tuple[int, int]:
        """Bytes ``[start, stop)`` of a block."""
        start = block * self.block_bytes
        return start, min(start + self.block_bytes, self.size)

    def check_block(self, block: int, data: Any, where: str) -> None:
        """Raises CorruptFile, naming ``where``, unless ``data`` (bytes-like) is this block."""
        self.check_digest(block, xxhash.xxh3_128_digest(data), where)

    def check_digest(self, block: int, digest: bytes, where: str) -> None:
        """Raises CorruptFile, naming ``where``, unless this block's hash is ``digest``."""
        if digest != self.digests[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
            start, stop = self.block_bounds(block)
            raise CorruptFile(f"{where}: block {block} (bytes {start}-{stop}) does not match its hash")

    def check_size(self, size: int | None, where: str) -> None:
        """Raises CorruptFile, naming ``where``, unless the file is as large as it should be (None: there is none)."""
        if size != self.size:
            problem = "missing" if size is None else f"{size} bytes"
            raise CorruptFile(f"{where}: {problem}, its manifest says {self.size}")
        if len(self.digests) != self.num_blocks * DIGEST_BYTES:
            listed = f"{len(self.digests) / DIGEST_BYTES:g} block hashes are listed"
            raise CorruptFile(f"{where}: {listed} for its {self.num_blocks} blocks")


def inside(path: str, where: str) -> str:
    """The path. Raises CorruptFile where it would leave the directory of ``where``, the manifest that names it."""
    if not path or path.startswith("/") or "\\" in path or ".." in path.split("/") or ":" in path:
        raise CorruptFile(f"{where}: names the file {path!r}, outside its own directory; it is not one of ours")
    return path


class BlockHasher:
    """Hashes a stream of bytes block by block."""

    def __init__(self, block_bytes: int = BLOCK_BYTES) -> None:
        self.block_bytes = block_bytes
        self._current = xxhash.xxh3_128()
        self._room = block_bytes
        self._done = bytearray()
        self.size = 0

    def update(self, data: memoryview) -> None:
        self.size += len(data)
        start = 0
        while start < len(data):
            if self._room == self.block_bytes <= len(data) - start:  # a whole block at once
                self._done += xxhash.xxh3_128_digest(data[start : start + self._room])
                start += self._room
                continue
            part = data[start : start + self._room]
            self._current.update(part)
            start += len(part)
            self._room -= len(part)
            if self._room == 0:
                self._done += self._current.digest()
                self._current, self._room = xxhash.xxh3_128(), self.block_bytes

    def digests(self) -> bytes:
        """Of all blocks, the last perhaps a short one."""
        return bytes(self._done) + (b"" if self._room == self.block_bytes else self._current.digest())
