"""Safetensors files written as a stream and read by ranges, through Storage, every block verified.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header of
``{name: {dtype, shape, data_offsets}}``, then the tensors' bytes. Writing needs one tensor in memory at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from data_shards.errors import CorruptFile
from data_shards.hashed_file import BLOCK_BYTES, FileEntry
from data_shards.storage import Storage
from data_shards.verified_reader import Piece, VerifiedReader, by_span
from trainer.base_weights import DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
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
    block_bytes: int = BLOCK_BYTES,
) -> FileEntry:
    """Write one safetensors file, asking ``produce(name)`` for each tensor in turn; again where an upload
    breaks."""
    return storage.write(
        relative, Repeated(lambda: _chunks(specs, lambda name: [produce(name)], metadata)), block_bytes
    )


def write_parts(
    storage: Storage,
    relative: str,
    specs: Mapping[str, TensorSpec],
    parts: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> FileEntry:
    """Write one safetensors file, of each tensor the ``parts(name)`` that are, in order, its elements: one part in
    memory at a time. Parts may be asked for again where an upload breaks."""
    return storage.write(relative, Repeated(lambda: _chunks(specs, parts, metadata)))


class Repeated:
    """Chunks that ``make`` makes anew whenever they are gone through, so that an upload can begin again."""

    def __init__(self, make: Callable[[], Iterator[Any]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Any]:
        return self._make()


def _chunks(
    specs: Mapping[str, TensorSpec],
    parts: Callable[[str], Iterable[torch.Tensor]],
    metadata: Mapping[str, str] | None,
) -> Iterator[Any]:
    """The file's bytes. Raises ValueError where parts are not what ``specs`` announced."""
    yield header_bytes(specs, metadata)
    for name, spec in specs.items():
        missing = spec.numel
        for part in parts(name):
            missing -= part.numel()
            if missing < 0 or part.dtype != spec.dtype:
                raise ValueError(f"{name}: got {tuple(part.shape)} {part.dtype}, announced {spec}")
            if part.numel():
                yield tensor_bytes(part)
        if missing:
            raise ValueError(f"{name}: {missing} elements are missing of {spec}")


class TensorFile:
    """A safetensors file listed in a manifest; reads ranges of flattened tensors.

    Raises CorruptFile where header, size or a touched block is not what was written.
    """

    def __init__(self, storage: Storage, entry: FileEntry) -> None:
        self.verified = VerifiedReader(storage, entry)
        self._where = storage.uri_of(entry.path)
        length = int.from_bytes(self.verified.read(0, 8), "little")
        if length > min(_MAX_HEADER_BYTES, entry.size - 8):
            raise CorruptFile(f"{self._where}: not a safetensors file (header of {length} bytes)")
        self._data_start = 8 + length
        header = json.loads(self.verified.read(8, self._data_start))
        self._tensors = {name: value for name, value in header.items() if name != "__metadata__"}

    def dtype(self, name: str) -> torch.dtype:
        if name not in self._tensors:
            raise CorruptFile(f"{self._where}: holds no tensor {name!r}")
        return DTYPES[self._tensors[name]["dtype"]]

    def piece(self, name: str, start: int, into: torch.Tensor) -> Piece:
        """Where the elements that are to fill ``into`` lie in the file.

        Args:
            start: the first of them, in the flattened tensor.
            into: 1-D, contiguous, on the CPU, of the file's dtype.
        """
        dtype, stop = self.dtype(name), start + into.numel()
        if into.dtype != dtype:
            raise CorruptFile(f"{self._where}: {name} is {dtype}, not {into.dtype}")
        low, high = self._tensors[name]["data_offsets"]
        if not 0 <= start <= stop <= (high - low) // dtype.itemsize:
            raise CorruptFile(f"{self._where}: {name} has fewer than {stop} elements")
        first = self._data_start + low + start * dtype.itemsize
        self.verified.check_bounds(first, first + into.nbytes)
        return Piece(first, memoryview(tensor_bytes(into)))

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` of the flattened tensor: 1-D, on the CPU."""
        found = torch.empty(max(0, stop - start), dtype=self.dtype(name))
        for pieces in by_span([self.piece(name, start, found)]):
            self.verified.read_span(pieces)
        return found

    def close(self) -> None:
        self.verified.close()
