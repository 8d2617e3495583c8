"""The tensors in a base model's safetensors files, and reading just one rank's elements of them.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header of
``{name: {dtype, shape, data_offsets}}``, then the tensors' bytes in C order. So the elements ``[a, b)`` of a flattened
tensor are one range of bytes. Nothing here is a collective.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trainer.errors import ModelError
from trainer.slices import slice_bounds

PIECE_BYTES = 16 * 1024 * 1024
"""Read at once; also what a thread holds aside where the model has another dtype or lies on a GPU."""
_THREADS = 4
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By their names in headers."""
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Weights as such; other types are quantised, and mean something only with their scales."""
_MAX_HEADER_BYTES = 100_000_000

Shape = tuple[int, ...]


class StoredTensor(NamedTuple):
    file: Path
    start: int
    """byte of the file"""
    dtype: torch.dtype | None
    """None for one that torch does not have"""
    shape: Shape


class Piece(NamedTuple):
    """Elements that lie together in a file and in a rank's slice of the parameter ``name``."""

    name: str
    file: Path
    start: int
    """byte of the file"""
    dtype: torch.dtype
    """in the file"""
    offset: int
    """element of the slice"""
    numel: int
    """elements"""

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def model_files(base: Path) -> list[Path]:
    """The files that transformers would load: ``model.safetensors``, else those that the index names.

    Raises ModelError where there is neither, or a file is missing.
    """
    single, index = base / "model.safetensors", base / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ModelError(f"{base} has neither {single.name} nor {index.name}, so nothing says which files to load")
    try:
        files = [base / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of safetensors files ({error!r})") from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{index} names {absent}, which are not there; was the base downloaded completely?")
    return files


def stored_tensors(base: Path) -> dict[str, StoredTensor]:
    """Every tensor of the base by name, from the files' headers. Raises ModelError where a file is damaged."""
    return {name: tensor for file in model_files(base) for name, tensor in _tensors_of(file).items()}


def _tensors_of(path: Path) -> dict[str, StoredTensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_MAX_HEADER_BYTES, size - 8):
            raise ModelError(f"{path} is not a safetensors file, or is cut off ({size} bytes)")
        data_start = 8 + length
        try:
            header = json.loads(file.read(length))
            return {
                name: _tensor(path, data_start, size, name, value)
                for name, value in header.items()
                if name != "__metadata__"
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{path}: its safetensors header can't be read ({error!r})") from error


def _tensor(path: Path, data_start: int, size: int, name: str, value: dict[str, Any]) -> StoredTensor:
    low, high = value["data_offsets"]
    shape, dtype = tuple(value["shape"]), DTYPES.get(value["dtype"])
    if not 0 <= low <= high <= size - data_start:
        raise ModelError(f"{path} has {size} bytes, and {name} should end at {data_start + high}: it is cut off")
    if dtype is not None and high - low != math.prod(shape) * dtype.itemsize:
        raise ModelError(f"{path}: {name} of shape {shape} in {value['dtype']} can't have {high - low} bytes")
    return StoredTensor(path, data_start + low, dtype, shape)


def check_complete(shapes: Mapping[str, Shape], stored: Mapping[str, StoredTensor]) -> None:
    """Raises ModelError where a parameter is in no file, or has another shape there."""
    if missing := [name for name in shapes if name not in stored]:
        raise missing_parameters(missing)
    for name, shape in shapes.items():
        if stored[name].shape != shape:
            raise ModelError(
                f"{stored[name].file}: {name} has shape {stored[name].shape}, and the model of config.json wants "
                f"{shape}; is config.json that of these weights? (model.config_overrides changes it too)"
            )


def missing_parameters(names: list[str]) -> ModelError:
    return ModelError(
        f"the base's files lack {len(names)} parameters of the model, first {sorted(names)[:3]}; they would be random. "
        "Give a complete base, with the config.json that belongs to it"
    )


def pieces_of_rank(
    shapes: Mapping[str, Shape], stored: Mapping[str, StoredTensor], rank: int, world_size: int
) -> list[Piece]:
    """What ``rank`` of ``world_size`` reads, at most ``PIECE_BYTES`` each, in the order of files and bytes (pure)."""
    pieces = []
    for name, shape in shapes.items():
        tensor = stored[name]
        assert tensor.dtype is not None, "asked before"
        first, stop = slice_bounds(math.prod(shape), rank, world_size)
        at_once = PIECE_BYTES // tensor.dtype.itemsize
        for start in range(first, stop, at_once):
            byte, numel = tensor.start + start * tensor.dtype.itemsize, min(at_once, stop - start)
            pieces.append(Piece(name, tensor.file, byte, tensor.dtype, start - first, numel))
    return sorted(pieces, key=lambda piece: (piece.file, piece.start))


def read_elements(name: str, tensor: StoredTensor, start: int, stop: int) -> torch.Tensor:
    """Elements ``[start, stop)`` of the flattened tensor: 1-D, in the dtype of its file. Raises ModelError."""
    assert tensor.dtype is not None, "asked before"
    found = torch.empty(stop - start, dtype=tensor.dtype)
    first = tensor.start + start * tensor.dtype.itemsize
    descriptor = os.open(tensor.file, os.O_RDONLY)
    try:
        _read(descriptor, Piece(name, tensor.file, first, tensor.dtype, 0, stop - start), found)
    finally:
        os.close(descriptor)
    return found


def read_pieces(pieces: list[Piece], slices: Mapping[str, torch.Tensor]) -> None:
    """Fill ``slices`` (1-D, of any dtype, on any device; values are rounded to the nearest) from the files."""
    aside = threading.local()
    with ExitStack() as stack:
        descriptors = {}
        for path in {piece.file for piece in pieces}:
            descriptors[path] = os.open(path, os.O_RDONLY)
            stack.callback(os.close, descriptors[path])

        def read(piece: Piece) -> None:
            target = slices[piece.name].detach()[piece.offset : piece.offset + piece.numel]
            if target.dtype == piece.dtype and target.device.type == "cpu":
                _read(descriptors[piece.file], piece, target)
                return
            if not hasattr(aside, "buffer"):  # one a thread: memory that was touched before is filled much faster
                aside.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)
            values = aside.buffer[: piece.nbytes].view(piece.dtype)
            _read(descriptors[piece.file], piece, values)
            target.copy_(values)

        pool = stack.enter_context(ThreadPoolExecutor(_THREADS))
        for _ in pool.map(read, pieces):
            pass


def _read(descriptor: int, piece: Piece, target: torch.Tensor) -> None:
    view: Any = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):  # a read may give less than was asked for
        count = os.preadv(descriptor, [view[done:]], piece.start + done)
        if count == 0:
            raise ModelError(f"{piece.file}: ended at byte {piece.start + done}, while {piece.name} was being read")
        done += count
