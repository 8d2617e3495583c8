"""Safetensors files written as a stream and read by ranges, through Storage, every block verified.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header of
``{name: {dtype, shape, data_offsets}}``, then the tensors' bytes. Writing needs one tensor in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from data_shards.errors import CorruptFile
from data_shards.storage import FileEntry, Storage, VerifiedReader

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}
_MAX_HEADER_BYTES = 100_000_000


class TensorSpec(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


def tensor_bytes(tensor: torch.Tensor) -> Any:
    """The tensor's elements in C order, without a copy if it is on the CPU and contiguous."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def header_bytes(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """What a safetensors file begins with: the header's length and the header, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_tensors(
    storage: Storage,
    relative: str,
    specs: Mapping[str, TensorSpec],
    produce: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> FileEntry:
    """Write one safetensors file, asking ``produce(name)`` for each tensor in turn."""

    def chunks() -> Iterator[Any]:
        yield header_bytes(specs, metadata)
        for name, spec in specs.items():
            tensor = produce(name)
            if tensor.numel() != spec.numel or tensor.dtype != spec.dtype:
                raise ValueError(f"{name}: got {tuple(tensor.shape)} {tensor.dtype}, announced {spec}")
            if spec.numel:
                yield tensor_bytes(tensor)

    return storage.write(relative, chunks())


class TensorFile:
    """A safetensors file listed in a manifest; reads ranges of flattened tensors.

    Raises CorruptFile where header, size or a touched block is not what was written.
    """

    def __init__(self, storage: Storage, entry: FileEntry) -> None:
        self._reader = VerifiedReader(storage, entry)
        self._where = storage.uri_of(entry.path)
        length = int.from_bytes(self._reader.read(0, 8), "little")
        if length > min(_MAX_HEADER_BYTES, entry.size - 8):
            raise CorruptFile(f"{self._where}: not a safetensors file (header of {length} bytes)")
        self._data_start = 8 + length
        header = json.loads(self._reader.read(8, self._data_start))
        self._tensors = {name: value for name, value in header.items() if name != "__metadata__"}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` of the flattened tensor: 1-D, on the CPU."""
        if name not in self._tensors:
            raise CorruptFile(f"{self._where}: holds no tensor {name!r}")
        value = self._tensors[name]
        dtype = _DTYPES[value["dtype"]]
        low, high = value["data_offsets"]
        if not 0 <= start <= stop <= (high - low) // dtype.itemsize:
            raise CorruptFile(f"{self._where}: {name} has fewer than {stop} elements")
        first = self._data_start + low + start * dtype.itemsize
        data = bytearray(self._reader.read(first, first + (stop - start) * dtype.itemsize))
        return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)

    def close(self) -> None:
        self._reader.close()
