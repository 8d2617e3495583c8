"""What a rank writes of a checkpoint, as the manifest lists it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_shards.errors import CorruptFile
from data_shards.hashed_file import FileEntry, inside
from data_shards.storage import Storage
from data_shards.verified_reader import SPAN_BYTES, VerifiedReader

RANK_BLOCK_BYTES = 32 * 1024
"""Where the number of workers changes, a rank reads a part of each slice in a file, and with blocks of 8 MiB half as
much again as it needs (``benchmarks/reshard_plan.py``). The hashes of small blocks are too many for the manifest."""


@dataclass(frozen=True)
class RankFile:
    """A rank's slices, and where the hashes of their blocks are."""

    path: str
    size: int
    """bytes"""
    block_bytes: int
    hashes: FileEntry | None
    """the file that holds them, one after the other; None in versions 1 and 2 of the manifest"""
    digests: bytes = b""
    """of versions 1 and 2"""

    def to_json(self) -> dict[str, Any]:
        assert self.hashes is not None, "only today's version is written"
        own = {"path": self.path, "size": self.size, "block_bytes": self.block_bytes}
        return own | {"hashes": self.hashes.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> RankFile:
        """Raises CorruptFile where a path would leave the directory of ``where``, the manifest."""
        if "hashes" not in value:
            entry = FileEntry.from_json(value, where)
            return cls(entry.path, entry.size, entry.block_bytes, None, entry.digests)
        path, block_bytes = inside(str(value["path"]), where), int(value["block_bytes"])
        if block_bytes <= 0 or SPAN_BYTES % block_bytes:
            raise CorruptFile(f"{where}: blocks of {block_bytes} bytes do not divide {SPAN_BYTES}")
        return cls(path, int(value["size"]), block_bytes, FileEntry.from_json(value["hashes"], where))

    def check_sizes(self, sizes: Mapping[str, int], directory: Storage) -> None:
        """Raises CorruptFile unless the files are as large as they should be.

        Args:
            sizes: of the files that are there, by name.
        """
        if self.hashes is not None:
            self.hashes.check_size(sizes.get(self.hashes.path), directory.uri_of(self.hashes.path))
        found = sizes.get(self.path)
        if found != self.size:
            problem = "missing" if found is None else f"{found} bytes"
            raise CorruptFile(f"{directory.uri_of(self.path)}: {problem}, its manifest says {self.size}")

    def is_whole(self, directory: Storage) -> bool:
        """Whether it is there, as far as its size tells."""
        files = (self.path,) if self.hashes is None else (self.path, self.hashes.path)
        sizes = {path: size for path in files if (size := directory.size(path)) is not None}
        try:
            self.check_sizes(sizes, directory)
        except CorruptFile:
            return False
        return True

    def hashed(self, directory: Storage) -> FileEntry:
        """With the hashes, which are read. Raises CorruptFile where they are not what was written."""
        if self.hashes is None:
            return FileEntry(self.path, self.size, self.digests, self.block_bytes)
        reader = VerifiedReader(directory, self.hashes)
        try:
            return FileEntry(self.path, self.size, bytes(reader.read(0, self.hashes.size)), self.block_bytes)
        finally:
            reader.close()


def place_of(beside: Storage, name: str, files_at: str | None, listed: RankFile) -> Storage:
    """The folder to read a rank's files from: of the fast tier this node's own, if it has them; else the manifest's.

    Args:
        beside: the manifest's folder.
        name: of the checkpoint.
        files_at: as the manifest says.
    """
    if files_at is not None and listed.is_whole(here := Storage.at(files_at).child(name)):
        return here
    return beside
