"""Remote shards on this node's disk: a bounded folder that all its workers share.

A file is named by the hash of its content, so it never changes and needs no owner. It appears by rename once every
block matched its hash; one process downloads, the others wait. Room is made by deleting what was used longest ago: a
reader that has a file mapped keeps its content, whatever becomes of its name.
"""

from __future__ import annotations

import errno
import fcntl
import getpass
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import xxhash

from data_shards import signed_json
from data_shards.errors import BadInput
from data_shards.hashed_file import FileEntry
from data_shards.reading.shard_file import map_file
from data_shards.storage import Storage
from data_shards.verified_reader import VerifiedReader

FOLDER_VARIABLE, GIB_VARIABLE = "BATON_CACHE_DIR", "BATON_CACHE_GIB"
_PART = ".part"
_ABANDONED_S = 600.0
"""A download that wrote nothing for so long has lost its writer."""
_LOCK_PATIENCE_S = 300.0
_LOCK_POLL_S = 0.02


def cache_name(entry: FileEntry) -> str:
    """The name of a file with this content (pure)."""
    return xxhash.xxh3_128(signed_json.canonical([entry.size, *entry.block_hashes])).hexdigest()


@dataclass(frozen=True)
class ShardCache:
    """A folder that holds at most ``max_bytes``, or one file if that alone is larger."""

    folder: Path
    max_bytes: int

    @classmethod
    def default(cls) -> ShardCache:
        """In $BATON_CACHE_DIR (else the system's folder for temporary files), of $BATON_CACHE_GIB (else half of what is
        free there). Raises BadInput where that can't be used."""
        place = os.environ.get(FOLDER_VARIABLE) or f"{tempfile.gettempdir()}/baton-shards-{getpass.getuser()}"
        gib = os.environ.get(GIB_VARIABLE)
        try:
            return cls.at(Path(place), int(float(gib) * 2**30) if gib else None)
        except (ValueError, OSError) as error:
            raise BadInput(
                f"the cache of remote shards in {place!r} can't be used: {error}. Set {FOLDER_VARIABLE} to a folder of "
                f"your own on a local disk, and {GIB_VARIABLE} to its size in GiB"
            ) from error

    @classmethod
    def at(cls, folder: Path, max_bytes: int | None = None) -> ShardCache:
        """Without ``max_bytes``: half of what is free on that disk, its own files counted as free."""
        (folder / "locks").mkdir(parents=True, exist_ok=True, mode=0o700)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user", str(folder))
        if max_bytes is None:
            held = sum(size for _, size, _ in _files(folder))
            max_bytes = (shutil.disk_usage(folder).free + held) // 2
        return cls(folder, max_bytes)

    def path(self, entry: FileEntry) -> Path:
        return self.folder / cache_name(entry)

    def holds(self, entry: FileEntry) -> bool:
        return self.path(entry).exists()

    def touch(self, entry: FileEntry) -> None:
        """Count it as used now."""
        with suppress(FileNotFoundError):
            os.utime(self.path(entry))

    def drop(self, entry: FileEntry) -> None:
        self.path(entry).unlink(missing_ok=True)

    def open(self, storage: Storage, entry: FileEntry) -> pa.Buffer:
        """The file, mapped; downloaded and verified first if no process of this node did so before.

        Raises:
            CorruptFile: it is missing in ``storage``, or is not what its entry says.
            OSError: the storage does not answer, or this disk is full.
        """
        if (found := self._find(entry)) is not None:
            return found
        name = cache_name(entry)
        with _locked(self.folder / "locks" / name[:2], _LOCK_PATIENCE_S):
            if (found := self._find(entry)) is not None:
                return found
            try:
                return self._download(storage, entry)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                self._make_room(self.max_bytes)  # others filled the disk: give all of ours
            try:
                return self._download(storage, entry)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise OSError(
                    errno.ENOSPC,
                    f"no room for a shard of {entry.size} bytes; free some, or set {FOLDER_VARIABLE} to another disk",
                    str(self.folder),
                ) from error

    def _find(self, entry: FileEntry) -> pa.Buffer | None:
        try:
            found = map_file(self.path(entry))
        except FileNotFoundError:
            return None
        self.touch(entry)
        return found

    def _download(self, storage: Storage, entry: FileEntry) -> pa.Buffer:
        reader = VerifiedReader(storage, entry)
        part = self._reserve(entry)
        try:
            with part.open("r+b") as file:
                for block in reader.blocks():
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            mapped = map_file(part)  # before it has a name under which another process may evict it
            part.replace(self.path(entry))
            return mapped
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        finally:
            reader.close()

    def _reserve(self, entry: FileEntry) -> Path:
        """An empty file of the right size, so that others who make room count it in full."""
        part = self.folder / f"{cache_name(entry)}.{uuid.uuid4().hex}{_PART}"
        with _locked(self.folder / "locks" / "room", _LOCK_PATIENCE_S):
            self._make_room(entry.size)
            with part.open("wb") as file:
                file.truncate(entry.size)
        return part

    def _make_room(self, size: int) -> None:
        """Delete the files used longest ago until ``size`` bytes more fit."""
        files = sorted(_files(self.folder))
        held = sum(found for _, found, _ in files)
        abandoned = time.time() - _ABANDONED_S
        for used, found, path in files:
            if held + size > self.max_bytes and (path.suffix != _PART or used < abandoned):
                path.unlink(missing_ok=True)
                held -= found


def _files(folder: Path) -> list[tuple[float, int, Path]]:
    """When each file was last used (Unix seconds), its bytes, its path."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # another process made room
                if entry.is_file():
                    status = entry.stat()
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
    return found


@contextmanager
def _locked(path: Path, patience_s: float) -> Iterator[None]:
    """Alone among the threads and processes of this node; the kernel frees the lock of a process that dies.

    Whoever has waited ``patience_s`` goes on without it: it saves work, correctness rests on renames.
    """
    deadline = time.monotonic() + patience_s
    with path.open("ab") as file:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_LOCK_POLL_S)
        yield
