"""Splits a step's wall time into parts without making the host wait for the device."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch


class StepClock:
    """Each ``mark`` ends a part that began at the mark before it.

    On a CPU the host's clock says how long. On a GPU the host runs ahead, so each mark is an event on the current
    stream: the time between two events is the part's share of the device's own timeline. Reading packs behind a busy
    device then counts as nothing, and waiting for them counts in full; both are what they cost.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, part: str) -> None:
        self._marks.append((part, self._now()))

    def seconds(self) -> dict[str, float]:
        """By part, all marks of a name together. Call it once the stream has been waited for anyway: on a GPU events
        that are still to come can't be read."""
        spent: dict[str, float] = {}
        for (_, begin), (part, end) in pairwise(self._marks):
            seconds = begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
            spent[part] = spent.get(part, 0.0) + seconds
        return spent
