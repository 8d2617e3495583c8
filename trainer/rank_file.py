"""What a rank writes of a checkpoint, as the manifest lists it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
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

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if self.hashes is None else (self.path, self.hashes.path)

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

    def is_whole(self, sizes: Mapping[str, int]) -> bool:
        """Whether all of it is there, as far as sizes tell."""
        return sizes.get(self.path) == self.size and (
            self.hashes is None or sizes.get(self.hashes.path) == self.hashes.size
        )

    def hashed(self, directory: Storage) -> FileEntry:
        """With the hashes, which are read. Raises CorruptFile where they are not what was written."""
        if self.hashes is None:
            return FileEntry(self.path, self.size, self.digests, self.block_bytes)
        reader = VerifiedReader(directory, self.hashes)
        try:
            return FileEntry(self.path, self.size, bytes(reader.read(0, self.hashes.size)), self.block_bytes)
        finally:
            reader.close()


class FilePlaces:
    """Where the files of a checkpoint are read, as seen from this node: of the fast tier on its own disk, or beside the
    manifest, where they are brought when another node needs them."""

    def __init__(self, beside: Storage, name: str, files_at: str | None) -> None:
        """
        Args:
            beside: the manifest's folder.
            name: of the checkpoint.
            files_at: as the manifest says.
        """
        self._beside = beside
        self._here = Storage.at(files_at).child(name) if files_at is not None else None
        self._sizes: dict[str, int] = {}
        if self._here is not None:
            with suppress(OSError):  # this node's disk is broken: it has nothing
                self._sizes = self._here.sizes()

    def find(self, listed: RankFile) -> Storage | None:
        """The folder; None where it is of the fast tier, and not in reach."""
        if self._here is None:
            return self._beside
        if listed.is_whole(self._sizes):
            return self._here
        return self._beside if listed.is_whole(self._brought) else None

    @cached_property
    def _brought(self) -> dict[str, int]:
        return self._beside.sizes()
