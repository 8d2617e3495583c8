"""What an export will write, decided before its first byte, and what of an earlier one may stay (pure)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

from data_shards import signed_json
from data_shards.errors import CorruptFile
from data_shards.hashed_file import FileEntry
from data_shards.storage import sha256
from trainer.tensor_files import TensorSpec, header_bytes

KIND = "baton-export"
VERSION = 1
MANIFEST = "baton-export.json"
METADATA = {"format": "pt"}
"""What transformers and peft ask a safetensors file for."""
MAX_FILE_BYTES = 2_000_000_000
"""The most that a kill makes to be written again, unless one tensor is larger. Ten seconds of a disk that writes
200 MB/s; a 70B model is 70 files."""
RANGE_ELEMENTS = 2 * 2**20
"""Converted at once: 8 MiB in fp32, as much as a block that is verified."""


class ExportKind(StrEnum):
    MODEL = "model"
    """all weights of a full-parameter run"""
    ADAPTER = "adapter"
    MERGED = "merged"
    """base + adapter"""

    @property
    def mark(self) -> str:
        """The file that is written last: without it there is no export."""
        return "adapter_config.json" if self == ExportKind.ADAPTER else "config.json"


@dataclass(frozen=True)
class PlannedFile:
    """A safetensors file that is to be written."""

    path: str
    specs: Mapping[str, TensorSpec]

    @cached_property
    def header(self) -> bytes:
        return header_bytes(self.specs, METADATA)

    @property
    def size(self) -> int:
        return len(self.header) + sum(spec.nbytes for spec in self.specs.values())

    def to_json(self) -> dict[str, Any]:
        """The header's hash stands for names, dtypes, shapes and order of the tensors."""
        return {"path": self.path, "size": self.size, "header_sha256": sha256(self.header)}


def plan_files(specs: Mapping[str, TensorSpec], max_file_bytes: int = MAX_FILE_BYTES) -> tuple[PlannedFile, ...]:
    """``model.safetensors``, or numbered files where it would hold more than ``max_file_bytes`` of tensors."""
    groups: list[dict[str, TensorSpec]] = [{}]
    room = max_file_bytes
    for name, spec in specs.items():
        if groups[-1] and spec.nbytes > room:
            groups.append({})
            room = max_file_bytes
        groups[-1][name] = spec
        room -= spec.nbytes
    if len(groups) == 1:
        return (PlannedFile("model.safetensors", groups[0]),)
    return tuple(
        PlannedFile(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)
    )


def index_file(files: Sequence[PlannedFile]) -> dict[str, bytes]:
    """What says which file holds which tensor, by its name; nothing where there is one file only."""
    if len(files) == 1:
        return {}
    index = {
        "metadata": {"total_size": sum(spec.nbytes for file in files for spec in file.specs.values())},
        "weight_map": {name: file.path for file in files for name in file.specs},
    }
    return {"model.safetensors.index.json": json.dumps(index, indent=1).encode()}


def ranges(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Elements ``[start, stop)`` of the flattened tensor that are converted at once: whole rows of its last dimension,
    so that a product of matrices can be made by rows."""
    row = spec.shape[-1] if len(spec.shape) > 1 else 1
    step = max(1, RANGE_ELEMENTS // max(1, row)) * row
    for start in range(0, spec.numel, max(1, step)):
        yield start, min(start + step, spec.numel)


@dataclass(frozen=True)
class ExportManifest:
    """``baton-export.json``: written after each file while an export goes on, and kept with it. It holds no times, so
    that equal exports are equal to the byte."""

    request: dict[str, Any]
    """everything that the weights' bytes depend on: checkpoint, kind, dtype, planned files"""
    files: tuple[FileEntry, ...]
    """that are written; once the export is whole, all but this one"""

    def to_bytes(self) -> bytes:
        return signed_json.encode(
            {"request": self.request, "files": [entry.to_json() for entry in self.files]}, KIND, VERSION
        )

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ExportManifest:
        """Raises CorruptFile unless it is whole, ours, of a known version, and names only files beside itself."""
        body = signed_json.decode(data, KIND, VERSION, where)
        try:
            return cls(body["request"], tuple(FileEntry.from_json(value, where) for value in body["files"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CorruptFile(f"{where}: a field is missing or of the wrong type ({error})") from error


@dataclass(frozen=True)
class ExportPlan:
    kind: ExportKind
    request: dict[str, Any]
    files: tuple[PlannedFile, ...]

    def may_keep(self, earlier: ExportManifest | None) -> tuple[FileEntry, ...]:
        """Files of an earlier attempt at the very same export; whether they are still whole is not known yet."""
        if earlier is None or earlier.request != self.request:
            return ()
        planned = {(file.path, file.size) for file in self.files}
        return tuple(entry for entry in earlier.files if (entry.path, entry.size) in planned)
