"""Files under one root, on a local or shared path or an object store, through pyarrow's filesystems.

A file appears whole or not at all: locally it is written aside, synced and renamed; an object store shows an
object only once its upload ends. What is not atomic everywhere (rename of folders, append, conditional put) is not
offered.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import xxhash

from data_shards.errors import BadInput, CorruptFile

BLOCK_BYTES = 8 * 1024 * 1024
"""Hashes are kept per block, so that a reader verifies just the blocks that it touches."""


@dataclass(frozen=True)
class FileEntry:
    """A file as its manifest lists it."""

    path: str
    """relative to the manifest's directory"""
    size: int
    """bytes"""
    block_hashes: tuple[str, ...]
    """xxh3-128 (hex) of each 8 MiB block"""

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "block_hashes": list(self.block_hashes)}

    @classmethod
    def from_json(cls, value: dict[str, Any], where: str) -> FileEntry:
        """Raises CorruptFile where the path would leave the directory of ``where``, the manifest."""
        path = str(value["path"])
        if not path or path.startswith("/") or "\\" in path or ".." in path.split("/") or ":" in path:
            raise CorruptFile(f"{where}: names the file {path!r}, outside its own directory; it is not one of ours")
        return cls(path, int(value["size"]), tuple(map(str, value["block_hashes"])))


class BlockHasher:
    """Hashes a stream of bytes block by block."""

    def __init__(self) -> None:
        self._current = xxhash.xxh3_128()
        self._room = BLOCK_BYTES
        self._done: list[str] = []
        self.size = 0

    def update(self, data: memoryview) -> None:
        self.size += len(data)
        while len(data):
            part, data = data[: self._room], data[self._room :]
            self._current.update(part)
            self._room -= len(part)
            if self._room == 0:
                self._done.append(self._current.hexdigest())
                self._current, self._room = xxhash.xxh3_128(), BLOCK_BYTES

    def hashes(self) -> tuple[str, ...]:
        return (*self._done, *([] if self._room == BLOCK_BYTES else [self._current.hexdigest()]))


@dataclass(frozen=True)
class Storage:
    """A folder in some filesystem. Paths given to its methods are relative, with ``/``."""

    uri: str
    _filesystem: pafs.FileSystem = field(repr=False, compare=False)
    _base: str

    @classmethod
    def at(cls, uri: str | Path) -> Storage:
        """Raises BadInput for a scheme that is not known or a path that is not absolute."""
        uri = str(uri)
        if "://" not in uri:
            if not os.path.isabs(uri):  # noqa: PTH117 - a string that may also be a URI
                raise BadInput(f"storage path {uri!r} is relative; by here it must have been resolved")
            return cls(uri, pafs.LocalFileSystem(), uri)
        try:
            filesystem, base = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise BadInput(f"storage {uri!r} can't be used: {error}. Give a path, s3://… or gs://…") from error
        return cls(uri, filesystem, base)

    def child(self, relative: str) -> Storage:
        return Storage(f"{self.uri.rstrip('/')}/{relative}", self._filesystem, self._full(relative))

    @property
    def local_path(self) -> Path | None:
        """Where it lies on this machine, if it does."""
        return Path(self._base) if isinstance(self._filesystem, pafs.LocalFileSystem) else None

    def _full(self, relative: str) -> str:
        return f"{self._base.rstrip('/')}/{relative}" if relative else self._base

    def check_writable(self) -> None:
        """Write and remove a small file. Raises BadInput with the reason."""
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, [b"baton"])
            self.delete_file(probe)
        except OSError as error:
            raise BadInput(
                f"storage {self.uri!r} can't be written: {error}. Check that it exists, its permissions and free "
                "space, or choose another with run.storage=…"
            ) from error

    def write(self, relative: str, chunks: Iterable[Any]) -> FileEntry:
        """Write one whole file from bytes-like chunks, and hash it on the way.

        If ``chunks`` raises, nothing becomes visible on a local path; an object store may show a truncated object,
        which no manifest names.
        """
        hasher = BlockHasher()
        local = self.local_path
        if local is None:
            with self._filesystem.open_output_stream(self._full(relative)) as stream:
                for chunk in chunks:
                    view = memoryview(chunk).cast("B")
                    hasher.update(view)
                    stream.write(view)
            return FileEntry(relative, hasher.size, hasher.hashes())
        target = local / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with aside.open("wb") as file:
                for chunk in chunks:
                    view = memoryview(chunk).cast("B")
                    hasher.update(view)
                    file.write(view)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(target)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync_directory(target.parent)
        return FileEntry(relative, hasher.size, hasher.hashes())

    def read(self, relative: str) -> bytes:
        """Raises FileNotFoundError."""
        try:
            with self._filesystem.open_input_file(self._full(relative)) as file:
                return file.read()
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from error

    def open(self, relative: str) -> pa.NativeFile:
        """For random access; memory-mapped where it is local."""
        if self.local_path is not None:
            return pa.memory_map(self._full(relative), "r")
        return self._filesystem.open_input_file(self._full(relative))

    def size(self, relative: str) -> int | None:
        """Bytes of a file, None where there is none."""
        info = self._filesystem.get_file_info(self._full(relative))
        return info.size if info.type == pafs.FileType.File else None

    def exists(self, relative: str) -> bool:
        return self.size(relative) is not None

    def list(self, relative: str = "") -> list[str]:
        """Names of files and folders directly inside, sorted; none where the folder does not exist."""
        selector = pafs.FileSelector(self._full(relative), allow_not_found=True, recursive=False)
        names = (info.base_name for info in self._filesystem.get_file_info(selector))
        return sorted(name for name in names if not name.startswith("."))

    def delete_file(self, relative: str) -> None:
        self._filesystem.delete_file(self._full(relative))

    def delete_tree(self, relative: str) -> None:
        self._filesystem.delete_dir(self._full(relative))


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class VerifiedReader:
    """Random access to a file listed in a manifest; every block that is touched is hashed first, once.

    Raises CorruptFile on a wrong size or hash.
    """

    def __init__(self, storage: Storage, entry: FileEntry) -> None:
        self._where = f"{storage.uri}/{entry.path}"
        size = storage.size(entry.path)
        if size != entry.size:
            raise CorruptFile(
                f"{self._where}: {'missing' if size is None else f'{size} bytes'}, its manifest says {entry.size}"
            )
        if len(entry.block_hashes) != -(-entry.size // BLOCK_BYTES):
            raise CorruptFile(
                f"{self._where}: its manifest lists {len(entry.block_hashes)} block hashes, too few or many"
            )
        self._file = storage.open(entry.path)
        self._entry = entry
        self._verified: set[int] = set()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes ``[start, stop)``."""
        if not 0 <= start <= stop <= self._entry.size:
            raise CorruptFile(f"{self._where}: asked for bytes {start}-{stop} of {self._entry.size}")
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            if block not in self._verified:
                self._verify(block)
        return self._file.read_at(stop - start, start)

    def verify_all(self) -> None:
        for block in range(len(self._entry.block_hashes)):
            self._verify(block)

    def _verify(self, block: int) -> None:
        start = block * BLOCK_BYTES
        data = self._file.read_at(min(BLOCK_BYTES, self._entry.size - start), start)
        if xxhash.xxh3_128(data).hexdigest() != self._entry.block_hashes[block]:
            raise CorruptFile(
                f"{self._where}: block {block} (bytes {start}-{start + len(data)}) does not match its hash"
            )
        self._verified.add(block)

    def close(self) -> None:
        self._file.close()


def content_hash(paths: Iterable[Path]) -> str:
    """xxh3-128 over contents in the given order: an identity among our own files, not a guard against forgers."""
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(f"{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(BLOCK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
