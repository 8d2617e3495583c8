"""A base model's tensors by ranges of elements."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from trainer.base_weights import Shape, read_elements, stored_tensors
from trainer.errors import ModelError


class BaseTensors:
    """Reads elements of a base's tensors. Files are not mapped: what is touched of a map counts as memory, and what
    safetensors gives is such a map.

    Raises ModelError where a file is not safetensors, or is cut off, or holds numbers that torch does not have.
    """

    def __init__(self, base: Path) -> None:
        self._stored = stored_tensors(base)
        for name, tensor in self._stored.items():
            if tensor.dtype is None:
                raise ModelError(f"{tensor.file}: {name} is of a type of numbers that can't be converted")

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def shape(self, name: str) -> Shape:
        return self._stored[name].shape

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` of the flattened tensor: 1-D, in the dtype of its file."""
        return read_elements(name, self._stored[name], start, stop)
