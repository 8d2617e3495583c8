"""Host memory for a rank's state: a save copies to it and training goes on; a load comes through it to a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

log = logging.getLogger(__name__)


class Staging:
    """One flat fp32 buffer, allocated and touched once and used for every save (and load); page-locked where the state
    is on a GPU.

    A fresh allocation costs a page fault every 4 KiB, which takes as long as the copy itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = None
        self._buffer = torch.empty(0)

    @property
    def nbytes(self) -> int:
        return self._buffer.nbytes

    def reserve(self, numel: int) -> None:
        """Make room for so many elements, and touch it."""
        if numel <= self._buffer.numel():
            return
        if self._on_gpu and self._buffer.is_pinned():
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(self._buffer.data_ptr()))
        self._buffer = torch.empty(0)  # the old one goes first
        self._buffer = torch.empty(numel).fill_(0.0)
        if self._on_gpu:
            _lock_pages(self._buffer)

    def copy(self, slices: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Copies of these 1-D fp32 tensors, end to end in the buffer; they hold until the buffer is used again."""
        return self.begin_copy(slices)()

    def begin_copy(self, slices: Iterable[tuple[str, torch.Tensor]]) -> Callable[[], dict[str, torch.Tensor]]:
        """What makes such copies, of the tensors as they are now: to be called once, from any thread, while nobody
        changes them. A GPU copies on a stream of its own, beside what else it computes."""
        found = dict(slices)
        copies = self._places(found)
        stream = self._stream_behind_current()

        def copy() -> dict[str, torch.Tensor]:
            with torch.cuda.stream(stream) if stream is not None else nullcontext():
                for name, value in found.items():
                    copies[name].copy_(value, non_blocking=True)
            if stream is not None:
                stream.synchronize()
            return copies

        return copy

    def _stream_behind_current(self) -> Any:
        """A GPU's second stream, which first waits for what this thread has asked the device to do."""
        if not self._on_gpu:
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._stream

    def fill(self, targets: Mapping[str, torch.Tensor], read: Callable[[Mapping[str, torch.Tensor]], object]) -> None:
        """Have ``read`` fill 1-D fp32 tensors in host memory: the targets themselves, or where they lie on a GPU, the
        buffer, from which they are copied."""
        if not self._on_gpu:
            read(targets)
            return
        places = self._places(targets)
        read(places)
        for name, target in targets.items():
            target.copy_(places[name], non_blocking=True)
        torch.cuda.synchronize()

    def _places(self, shaped: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Room in the buffer for tensors as large as these."""
        self.reserve(sum(value.numel() for value in shaped.values()))
        places: dict[str, torch.Tensor] = {}
        start = 0
        for name, value in shaped.items():
            places[name] = self._buffer[start : start + value.numel()]
            start += value.numel()
        return places


def _lock_pages(buffer: torch.Tensor) -> None:
    """torch's own allocator of pinned memory would round the size up to a power of two."""
    try:
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
    except RuntimeError as error:
        log.warning("host memory for saves could not be page-locked, so steps wait longer for them: %s", error)
