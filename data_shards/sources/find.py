"""A source to its files: globs, folders, object stores, saved datasets and datasets by name."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
import xxhash

from data_shards.errors import DataError
from data_shards.sources.batches import batches
from data_shards.sources.config import SourceConfig
from data_shards.sources.files import (
    EXTENSIONS,
    SourceFile,
    SourceKind,
    filesystem_of,
    kind_of,
    reading,
    stored_identity,
)

_HF = "hf://"
_PLAIN_IN_URI = "/=:@+,;!$&'()~[]*"
_WILD = re.compile(r"[*?\[]")
_DATASET_STATE, _DATASET_SPLITS = "state.json", "dataset_dict.json"
_NOT_DATA = {_DATASET_STATE, _DATASET_SPLITS, "dataset_info.json", "dataset_infos.json"}
_KNOWN = f"{', '.join('.' + extension for extension in EXTENSIONS)}, and those with .gz or .zst"


def resolve(source: SourceConfig) -> tuple[SourceFile, ...]:
    """The files of a source, in the order of their paths (a saved dataset's in its own order).

    Raises DataError where nothing is there, where a name says nothing of what is in the file, and where a folder holds
    files of several kinds.
    """
    if source.path.startswith(_HF):
        return (SourceFile(source.path, 0, SourceKind.DATASET, hf_config=source.hf_config, hf_split=source.hf_split),)
    filesystem, path = filesystem_of(source.path)
    place = _Place(source.path, filesystem, path.rstrip("/") or "/")
    (info,) = place.look([place.path])
    if info.type == pafs.FileType.File:
        return (place.file(info),)
    if info.type == pafs.FileType.Directory:
        return place.saved_dataset(source.hf_split) or place.folder()
    if _WILD.search(place.path):
        return place.matches()
    raise DataError(
        f"{source.path}: no such file. Check data.train and data.validation; paths are relative to where you run"
    )


def content_identity(file: SourceFile) -> str:
    """A hash or tag that changes with the content; a copy elsewhere has the same, but for objects without a tag.

    Local files: xxh3-128 of their bytes. Objects: size and ETag (or time of writing). Datasets by name: xxh3-128 of
    their rows.
    """
    if file.kind != SourceKind.DATASET:
        with reading(file):
            stored = stored_identity(file)
        if stored is not None:
            return stored
    digest = xxhash.xxh3_128()
    for batch in batches(file):
        digest.update(batch.data)
    return digest.hexdigest()


class _Place:
    """One path in its filesystem, and the URI by which the user knows it."""

    def __init__(self, uri: str, filesystem: pafs.FileSystem, path: str) -> None:
        self.uri = uri
        self.path = path
        self._filesystem = filesystem

    def look(self, what: Sequence[str] | pafs.FileSelector) -> list[pafs.FileInfo]:
        try:
            return self._filesystem.get_file_info(what)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.uri}: can't be looked up ({error}). Check the path and your credentials") from error

    def uri_of(self, path: str) -> str:
        scheme, separator, rest = self.uri.partition("://")
        if not separator:
            return path
        _, mark, query = rest.partition("?")
        return f"{scheme}://{quote(path, safe=_PLAIN_IN_URI)}{mark}{query}"

    def file(self, info: pafs.FileInfo) -> SourceFile:
        uri = self.uri if info.path == self.path else self.uri_of(info.path.removeprefix("./"))
        found = kind_of(info.base_name)
        if found is None:
            raise DataError(f"{uri}: its name does not say what is in it. Known are {_KNOWN}; rename it")
        return SourceFile(uri, info.size, *found)

    def _below(self, folder: str, *, recursive: bool) -> list[tuple[list[str], pafs.FileInfo]]:
        """Files in a folder by path, with its parts below the folder; without what is hidden or describes the rest."""
        start = f"{folder or '.'}".rstrip("/") + "/"
        found = self.look(pafs.FileSelector(folder or ".", recursive=recursive, allow_not_found=True))
        infos = sorted((info for info in found if info.type == pafs.FileType.File), key=lambda info: info.path)
        parted = [(info.path.removeprefix(start).split("/"), info) for info in infos]
        return [(parts, info) for parts, info in parted if not _is_aside(parts)]

    def folder(self) -> tuple[SourceFile, ...]:
        infos = [info for _, info in self._below(self.path, recursive=True)]
        files = tuple(map(self.file, (info for info in infos if kind_of(info.base_name))))
        if not files:
            raise DataError(f"{self.uri}: no data file in this folder. Known are {_KNOWN}")
        kinds = Counter(file.kind for file in files)
        if len(kinds) > 1:
            listed = ", ".join(f"{count} {kind.value}" for kind, count in sorted(kinds.items()))
            raise DataError(f"{self.uri}: this folder holds files of several kinds ({listed}); say which by a glob")
        return files

    def matches(self) -> tuple[SourceFile, ...]:
        parts = self.path.split("/")
        wild = next(index for index, part in enumerate(parts) if _WILD.search(part))
        folder, pattern = "/".join(parts[:wild]) or ("/" if wild else ""), parts[wild:]
        below = self._below(folder, recursive=len(pattern) > 1 or pattern == ["**"])
        chosen = [info for found, info in below if _fits(found, pattern)]
        if not chosen:
            raise DataError(f"{self.uri}: no file matches. Paths are relative to where you run; ** goes into folders")
        return tuple(map(self.file, chosen))

    def saved_dataset(self, split: str | None) -> tuple[SourceFile, ...]:
        """The files of a folder that ``datasets``' save_to_disk has written; none where it is no such folder."""
        names = {info.base_name for info in self.look(pafs.FileSelector(self.path, recursive=False))}
        if _DATASET_SPLITS in names:
            splits = self._json(_DATASET_SPLITS)["splits"]
            chosen = split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
            if chosen not in splits:
                raise DataError(f"{self.uri}: has the splits {', '.join(splits)}, not {chosen!r}; set hf_split")
            inner = _Place(self.uri_of(f"{self.path}/{chosen}"), self._filesystem, f"{self.path}/{chosen}")
            return inner.saved_dataset(None)
        if _DATASET_STATE not in names:
            return ()
        files = [f"{self.path}/{entry['filename']}" for entry in self._json(_DATASET_STATE)["_data_files"]]
        infos = self.look(files)
        if missing := [info.path for info in infos if info.type != pafs.FileType.File]:
            raise DataError(f"{missing[0]}: missing, and {self.path}/{_DATASET_STATE} lists it; the copy is not whole")
        return tuple(map(self.file, infos))

    def _json(self, name: str) -> dict:
        try:
            with self._filesystem.open_input_file(f"{self.path}/{name}") as file:
                return json.loads(file.read())
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}/{name}: not what datasets' save_to_disk writes ({error})") from error


def _is_aside(parts: Sequence[str]) -> bool:
    return any(part.startswith((".", "_")) for part in parts) or parts[-1] in _NOT_DATA


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path matches, component by component; ``**`` stands for any number of them."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        rest = pattern[1:] or ["*"]
        return any(_fits(parts[index:], rest) for index in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])
