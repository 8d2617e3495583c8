"""Files under one root, on a local or shared path or an object store, through pyarrow's filesystems.

A file appears whole or not at all: locally it is written aside, synced and renamed; an object store shows an
object only once its upload ends. What is not atomic everywhere (rename of folders, append, conditional put) is not
offered.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import xxhash

from data_shards.credentials import refuse_secret
from data_shards.errors import BadInput
from data_shards.fault_points import reach
from data_shards.hashed_file import BLOCK_BYTES, BlockHasher, FileEntry
from data_shards.retry import A_MOMENT, ONE_MINUTE, Patience, Result, is_io_error, with_retries

_COPY_BYTES = 1024 * 1024
"""Hashed and written at a time, so that what is written still lies in the processor's cache."""

OUT_OF_ROOM = (errno.ENOSPC, errno.EDQUOT)

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp|\.probe-[0-9a-f]{32}")
"""What a writer, or a check of whether one may write, leaves when it is killed."""


@dataclass(frozen=True)
class Storage:
    """A folder in some filesystem. Paths given to its methods are relative, with ``/``.

    What fails for a moment (a server that is overloaded, a connection that breaks) is tried again for a minute.
    """

    uri: str
    _filesystem: pafs.FileSystem = field(repr=False, compare=False)
    _base: str
    _patience: Patience = field(default=ONE_MINUTE, repr=False, compare=False)

    @classmethod
    def at(cls, uri: str | Path, patience: Patience = ONE_MINUTE) -> Storage:
        """Raises BadInput for a scheme that is not known, a path that is not absolute, or a secret in the URI."""
        uri = str(uri)
        if "://" not in uri:
            if not os.path.isabs(uri):  # noqa: PTH117 - a string that may also be a URI
                raise BadInput(f"storage path {uri!r} is relative; by here it must have been resolved")
            return cls(uri, pafs.LocalFileSystem(), uri, patience)
        refuse_secret(uri, "storage")
        try:
            filesystem, base = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, OSError) as error:
            raise BadInput(f"storage {uri!r} can't be used: {error}. Give a path, s3://… or gs://…") from error
        return cls(uri, filesystem, base, patience)

    @classmethod
    def holding(cls, uri: str) -> tuple[Storage, str]:
        """The folder that something lies in, and its name there: of a URI that ``uri_of`` made."""
        place, mark, options = _parted(uri)
        folder, _, name = place.rpartition("/")
        return cls.at(folder + mark + options), name

    def child(self, relative: str) -> Storage:
        return Storage(self.uri_of(relative), self._filesystem, self._full(relative), self._patience)

    def uri_of(self, relative: str) -> str:
        """The full name of something in here; a store's options (``s3://…?endpoint_override=…``) stay at its end."""
        place, mark, options = _parted(self.uri)
        return f"{place.rstrip('/')}/{relative}{mark}{options}"

    @property
    def local_path(self) -> Path | None:
        """Where it lies on this machine, if it does."""
        return Path(self._base) if isinstance(self._filesystem, pafs.LocalFileSystem) else None

    def bounded(self) -> Storage:
        """The same folder, for writing large files in little memory: to S3, pyarrow sends parts behind the writer, all
        that there are at once, so that of what is made faster than it is sent everything would be held."""
        if not isinstance(self._filesystem, pafs.S3FileSystem):
            return self
        make, (options,) = self._filesystem.__reduce__()  # its only way to tell how it was opened
        return replace(self, _filesystem=make({**options, "background_writes": False}))

    def _full(self, relative: str) -> str:
        return f"{self._base.rstrip('/')}/{relative}" if relative else self._base

    def retrying(self, action: Callable[[], Result], verb: str, relative: str) -> Result:
        """``action``, again while it fails in a way that may pass; ``verb`` and ``relative`` are for the log."""
        return with_retries(action, f"{verb} {self.uri_of(relative)}", self._patience)

    def reading(self, action: Callable[[], Result], verb: str, relative: str) -> Result:
        """The same for what changes nothing: it is tried again for a moment also where the file system gives an I/O
        error."""
        what = f"{verb} {self.uri_of(relative)}"
        return self.retrying(lambda: with_retries(action, what, A_MOMENT, is_io_error), verb, relative)

    def check_writable(self) -> None:
        """Write and remove a small file. Raises BadInput with the reason, but OSError where the disk is full."""
        probe = f".probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, [b"baton"])
            self.delete_file(probe)
        except OSError as error:
            if error.errno in OUT_OF_ROOM:
                raise  # nothing that was given is wrong
            raise BadInput(
                f"storage {self.uri!r} can't be written: {error}. Check that it exists, its permissions and free "
                "space, or choose another with run.storage=…"
            ) from error

    def write(self, relative: str, chunks: Iterable[Any], block_bytes: int = BLOCK_BYTES) -> FileEntry:
        """Write one whole file from bytes-like chunks, and hash it on the way, in blocks of so many bytes.

        If ``chunks`` raises, nothing becomes visible on a local path; an object store may show a truncated object,
        which no manifest names. An upload that breaks begins again if ``chunks`` can be iterated again (a list can, a
        generator can't).
        """
        if self.local_path is not None:
            return self._write_local(self.local_path / relative, relative, chunks, BlockHasher(block_bytes))
        if iter(chunks) is chunks:
            return self._upload(relative, chunks, block_bytes)
        return self.retrying(lambda: self._upload(relative, chunks, block_bytes), "writing", relative)

    def _upload(self, relative: str, chunks: Iterable[Any], block_bytes: int) -> FileEntry:
        hasher = BlockHasher(block_bytes)
        reach("upload", self._full(relative))
        with self._filesystem.open_output_stream(self._full(relative)) as stream:
            _copy(chunks, hasher, stream.write)
            reach("end upload", self._full(relative))
        reach("uploaded", self._full(relative))
        return FileEntry(relative, hasher.size, hasher.digests(), block_bytes)

    @staticmethod
    def _write_local(target: Path, relative: str, chunks: Iterable[Any], hasher: BlockHasher) -> FileEntry:
        reach("create", target)
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        try:
            with aside.open("wb") as file:
                reach("write", target)
                _copy(chunks, hasher, file.write)
                file.flush()
                reach("sync", target)
                os.fsync(file.fileno())
            reach("rename", target)
            aside.replace(target)
        except BaseException as error:
            aside.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename is None:  # a write does not say where there was no room
                error.filename = str(target)
            raise
        reach("sync folder", target)
        _sync_directory(target.parent)
        reach("written", target)
        return FileEntry(relative, hasher.size, hasher.digests(), hasher.block_bytes)

    def read(self, relative: str) -> bytes:
        """Raises FileNotFoundError."""
        try:
            return self.reading(lambda: self._read(relative), "reading", relative)
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from error

    def _read(self, relative: str) -> bytes:
        reach("read", self._full(relative))
        with self._filesystem.open_input_file(self._full(relative)) as file:
            return file.read()

    def open(self, relative: str) -> pa.NativeFile:
        """For random access. What is read from it is not tried again."""
        return self.reading(lambda: self._filesystem.open_input_file(self._full(relative)), "opening", relative)

    def size(self, relative: str) -> int | None:
        """Bytes of a file, None where there is none."""
        info = self.reading(lambda: self._filesystem.get_file_info(self._full(relative)), "looking at", relative)
        return info.size if info.type == pafs.FileType.File else None

    def sizes(self, relative: str = "") -> dict[str, int]:
        """Bytes of each file directly inside, by name: one request for a thousand of them."""
        return {info.base_name: info.size for info in self._infos(relative) if info.type == pafs.FileType.File}

    def _infos(self, relative: str) -> Iterable[pafs.FileInfo]:
        selector = pafs.FileSelector(self._full(relative), allow_not_found=True, recursive=False)

        def listed() -> Iterable[pafs.FileInfo]:
            try:
                return self._filesystem.get_file_info(selector)
            except FileNotFoundError:  # made, or gone, between pyarrow's looking for it and its listing
                return self._filesystem.get_file_info(selector)

        return self.reading(listed, "listing", relative)

    def exists(self, relative: str) -> bool:
        return self.size(relative) is not None

    def list(self, relative: str = "") -> list[str]:
        """Names of files and folders directly inside, sorted; none where the folder does not exist."""
        names = (info.base_name for info in self._infos(relative))
        return sorted(name for name in names if not name.startswith("."))

    def remove_leftovers(self, relative: str = "") -> tuple[str, ...]:
        """Delete what killed writers left directly inside a folder, and return its names.

        Call it only while nobody else writes there. (Of an object store's unfinished uploads nothing can be seen;
        a lifecycle rule of the bucket should end them.)
        """
        found = sorted(info.base_name for info in self._infos(relative) if _LEFTOVER.fullmatch(info.base_name))
        for name in found:
            self.delete_file(f"{relative}/{name}" if relative else name)
        return tuple(found)

    def delete_file(self, relative: str) -> None:
        reach("delete", self._full(relative))
        self.retrying(lambda: self._filesystem.delete_file(self._full(relative)), "deleting", relative)
        reach("deleted", self._full(relative))

    def delete_tree(self, relative: str) -> None:
        reach("delete tree", self._full(relative))
        self.retrying(lambda: self._filesystem.delete_dir(self._full(relative)), "deleting", relative)
        reach("deleted tree", self._full(relative))


def _parted(uri: str) -> tuple[str, str, str]:
    """A place, a question mark and a store's options; the last two are empty where it has none."""
    return uri.partition("?") if "://" in uri else (uri, "", "")


def _copy(chunks: Iterable[Any], hasher: BlockHasher, write: Callable[[memoryview], Any]) -> None:
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for start in range(0, len(view), _COPY_BYTES):
            part = view[start : start + _COPY_BYTES]
            hasher.update(part)
            write(part)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
