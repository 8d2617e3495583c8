"""A file of a source: what it is by its name, how it is opened, and which content it has."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from data_shards.errors import DataError
from data_shards.storage import content_hash


class SourceKind(StrEnum):
    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    ARROW = "arrow"
    TEXT = "text"
    DATASET = "dataset"
    """a Hugging Face dataset, loaded by its name"""


class Compression(StrEnum):
    NONE = "none"
    GZ = "gz"
    ZST = "zst"


EXTENSIONS = {
    "jsonl": SourceKind.JSONL,
    "ndjson": SourceKind.JSONL,
    "json": SourceKind.JSON,
    "csv": SourceKind.CSV,
    "tsv": SourceKind.TSV,
    "parquet": SourceKind.PARQUET,
    "pq": SourceKind.PARQUET,
    "arrow": SourceKind.ARROW,
    "txt": SourceKind.TEXT,
}
_COMPRESSIONS = {"gz": Compression.GZ, "zst": Compression.ZST}
_CODECS = {Compression.GZ: "gzip", Compression.ZST: "zstd"}
_FETCH_BYTES = 8 << 20
"""Asked of an object store at a time; each request has its latency."""
_NAME = re.compile(rf"(?i)\.({'|'.join(EXTENSIONS)})(?:\.({'|'.join(_COMPRESSIONS)}))?$")


@dataclass(frozen=True)
class SourceFile:
    """One file (or one split of a dataset by name), as ``sources.resolve`` finds it. Can be pickled."""

    uri: str
    size: int
    """bytes as it is stored; 0 for a dataset by name"""
    kind: SourceKind
    compression: Compression = Compression.NONE
    hf_config: str | None = None
    hf_split: str | None = None


def kind_of(name: str) -> tuple[SourceKind, Compression] | None:
    """By the extension; None where it is not known."""
    found = _NAME.search(name)
    if found is None:
        return None
    return EXTENSIONS[found[1].lower()], _COMPRESSIONS.get((found[2] or "").lower(), Compression.NONE)


def filesystem_of(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem that a path or URI is in, and the path there. Raises DataError for an unknown scheme."""
    if "://" not in uri:
        return pafs.LocalFileSystem(), os.fspath(Path(uri).expanduser())
    try:
        return pafs.FileSystem.from_uri(_checked(uri))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{uri}: can't be used ({error}). Give a path, s3://…, gs://… or hf://…") from error


def _checked(uri: str) -> str:
    """With a glob's brackets quoted, which the path of a URI may not hold as they are."""
    path, mark, query = uri.partition("?")
    if mark and "=" not in query:
        raise DataError(f"{uri}: in a URI ? begins its options (?region=…); as a wildcard use * or [abc]")
    return path.replace("[", "%5B").replace("]", "%5D") + mark + query


@contextmanager
def reading(file: SourceFile) -> Iterator[None]:
    """Say which file it was, where a library says only what is wrong."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{file.uri}: no such file; it was there when the source was looked up") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file.uri}: can't be read as {description_of(file)} ({error}). Is it complete, and is its name right?"
        ) from error


def description_of(file: SourceFile) -> str:
    packed = "" if file.compression == Compression.NONE else f", {file.compression.value}"
    return f"{file.kind.value}{packed}"


def open_stream(file: SourceFile, offset: int = 0) -> pa.NativeFile:
    """Its bytes from ``offset`` on, decompressed on the way; what is before is skipped where the file is plain."""
    filesystem, path = filesystem_of(file.uri)
    if file.compression == Compression.NONE and offset:
        plain = filesystem.open_input_file(path)
        plain.seek(offset)
        return plain
    remote = not isinstance(filesystem, pafs.LocalFileSystem)
    stream = filesystem.open_input_stream(path, compression=None, buffer_size=_FETCH_BYTES if remote else None)
    if file.compression != Compression.NONE:
        stream = pa.CompressedInputStream(stream, _CODECS[file.compression])
    while offset and (skipped := len(stream.read(min(offset, _FETCH_BYTES)))):
        offset -= skipped
    return stream


def open_local(file: SourceFile) -> IO[bytes]:
    """Its decompressed bytes as a local file: itself, or a copy that vanishes when it is closed."""
    filesystem, path = filesystem_of(file.uri)
    if file.compression == Compression.NONE and isinstance(filesystem, pafs.LocalFileSystem):
        return Path(path).open("rb")
    copy = tempfile.TemporaryFile()  # noqa: SIM115 - the caller closes it
    with open_stream(file) as stream:
        shutil.copyfileobj(stream, copy, 1 << 20)
    copy.seek(0)
    return copy


def open_random(file: SourceFile) -> pa.NativeFile:
    """For random access: mapped where it is local, by ranges where it is remote, a local copy if compressed."""
    filesystem, path = filesystem_of(file.uri)
    if file.compression != Compression.NONE:
        return pa.PythonFile(open_local(file), mode="r")
    if isinstance(filesystem, pafs.LocalFileSystem):
        return pa.memory_map(path, "r")
    return filesystem.open_input_file(path)


def stored_identity(file: SourceFile) -> str | None:
    """The content's identity without reading it all where that can be had: a local file's hash, an object's tag.

    An object's ETag where its store gives one (it survives a copy of the same content), else when it was written.
    None where neither is known.
    """
    filesystem, path = filesystem_of(file.uri)
    if isinstance(filesystem, pafs.LocalFileSystem):
        return content_hash([Path(path)])
    with filesystem.open_input_stream(path, compression=None) as stream:
        tag = _etag(stream.metadata())
    info = filesystem.get_file_info(path)
    if tag:
        return f"{info.size}-{tag}"
    return None if info.mtime_ns is None else f"{info.size}-{info.mtime_ns}"


def _etag(metadata: dict[Any, Any]) -> str:
    found = {_text(key).lower(): _text(value) for key, value in (metadata or {}).items()}
    return found.get("etag", "").strip('"')


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
