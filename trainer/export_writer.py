"""Writes an export, or what is missing of it: weights, then what loads them, then the file that makes it one.

After each file of weights the manifest is written anew, so that after a kill only one of them is lost. Nothing is
renamed or appended to: object stores do.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from data_shards.errors import BadInput, CorruptFile
from data_shards.hashed_file import BLOCK_BYTES, BlockHasher, FileEntry
from data_shards.storage import Storage
from data_shards.verified_reader import VerifiedReader
from trainer.export_plan import MANIFEST, METADATA, ExportManifest, ExportPlan, PlannedFile, ranges
from trainer.tensor_files import Repeated, write_parts

Produce = Callable[[str, int, int], torch.Tensor]
"""Elements ``[start, stop)`` of the flattened tensor of that name, in the export's dtype; always whole rows."""
Contents = Mapping[str, bytes | Path]
"""Files by name: what is in them, or where it lies."""

_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def write_export(
    target: Storage, plan: ExportPlan, produce: Produce, rest: Contents, report: Callable[[str], None]
) -> None:
    """Leave the whole export in ``target``, whatever was there; what an earlier attempt finished stays.

    Only one at a time may write there.

    Args:
        rest: all other files, with ``plan.kind.mark``; they are written in any case.

    Raises:
        BadInput: no room on a local target; nothing was touched.
    """
    target = target.bounded()
    target.remove_leftovers()
    earlier = _earlier(target)
    listed = {entry.path: entry for entry in earlier.files} if earlier else {}
    kept = _verified(target, plan, earlier, report)
    stale = {
        name: size
        for name, size in target.sizes().items()
        if name not in kept and (_WEIGHTS.fullmatch(name) or (name in listed and name not in rest))
    }
    missing = [file for file in plan.files if file.path not in kept]
    needed = sum(file.size for file in missing) + sum(map(_size, rest.values()))
    if (folder := target.local_path) is not None:
        check_room(folder, needed, sum(stale.values()))
    differs = (name not in listed or _entry(name, data) != listed[name] for name, data in rest.items())
    if missing or stale or any(differs):
        _invalidate(target, plan.kind.mark)  # else it would count as one while it is half of another
    for name in stale:
        target.delete_file(name)
    for file in missing:
        kept[file.path] = _write_file(target, file, produce)
        target.write(MANIFEST, [ExportManifest(plan.request, _in_order(plan, kept)).to_bytes()])
    _finish(target, plan, _in_order(plan, kept), rest)


def check_room(folder: Path, needed: int, freed: int = 0) -> None:
    """Raises BadInput unless ``needed`` bytes can be written there once ``freed`` bytes of it are deleted."""
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(there).free + freed
    if needed > free:
        raise BadInput(
            f"no room for the export in {folder}: it needs {needed:,} bytes ({needed / 2**30:.2f} GiB) and "
            f"{free:,} ({free / 2**30:.2f} GiB) are free. Delete what is not needed there (older exports?), or export "
            "with fewer bytes a weight (export.dtype=bf16)"
        )


def _verified(
    target: Storage, plan: ExportPlan, earlier: ExportManifest | None, report: Callable[[str], None]
) -> dict[str, FileEntry]:
    """Finished files that are still whole: every byte is read."""
    found = {}
    for entry in plan.may_keep(earlier):
        try:
            reader = VerifiedReader(target, entry)
            try:
                reader.verify_all()
            finally:
                reader.close()
        except CorruptFile as error:
            report(f"{error}; it is written again")
        else:
            found[entry.path] = entry
    if found:
        report(f"{target.uri}: {len(found)} of {len(plan.files)} files of weights were written before and are whole")
    return found


def _earlier(target: Storage) -> ExportManifest | None:
    try:
        return ExportManifest.from_bytes(target.read(MANIFEST), target.uri_of(MANIFEST))
    except (FileNotFoundError, CorruptFile):
        return None


def _invalidate(target: Storage, mark: str) -> None:
    if target.exists(mark):
        target.delete_file(mark)


def _write_file(target: Storage, file: PlannedFile, produce: Produce) -> FileEntry:
    def parts(name: str) -> Iterator[torch.Tensor]:
        return (produce(name, start, stop) for start, stop in ranges(file.specs[name]))

    return write_parts(target, file.path, file.specs, parts, METADATA)


def _in_order(plan: ExportPlan, entries: Mapping[str, FileEntry]) -> tuple[FileEntry, ...]:
    return tuple(entries[file.path] for file in plan.files if file.path in entries)


def _finish(target: Storage, plan: ExportPlan, weights: tuple[FileEntry, ...], rest: Contents) -> None:
    """The other files, the manifest of all of them, and the mark."""
    mark = plan.kind.mark
    others = tuple(target.write(name, _chunks(data)) for name, data in sorted(rest.items()) if name != mark)
    last = _entry(mark, rest[mark])
    target.write(MANIFEST, [ExportManifest(plan.request, (*weights, *others, last)).to_bytes()])
    target.write(mark, _chunks(rest[mark]))


def _entry(name: str, data: bytes | Path) -> FileEntry:
    hasher = BlockHasher()
    for chunk in _chunks(data):
        hasher.update(memoryview(chunk))
    return FileEntry(name, hasher.size, hasher.digests())


def _size(data: bytes | Path) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data)


def _chunks(data: bytes | Path) -> Any:
    return Repeated(lambda: _blocks(data)) if isinstance(data, Path) else [data]


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block
