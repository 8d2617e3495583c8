"""How many whole parameters ZeRO-3 holds at once: a replay of DeepSpeed's own fetch and release rules (pure).

Source: ``deepspeed/runtime/zero/partitioned_param_coordinator.py`` (``_fetch_sub_module_impl``,
``__params_to_release``) and ``partition_parameters.py`` (``AllGatherCoalescedHandle.wait``), once it has seen a whole
step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from trainer.config import ZeroConfig
from trainer.model_shape import ModelShape, ModuleShape, ParameterShape

MAX_REUSE_DISTANCE = 1_000_000_000
"""Elements: DeepSpeed's ``stage3_max_reuse_distance``, which ``trainer/deepspeed_config.py`` leaves as it is."""


class Gathered(NamedTuple):
    persistent_bytes: int
    """always whole, beside their slices"""
    peak_bytes: int
    """of all others at the worst moment of a step, with the largest prefetched bucket twice, while it is copied out"""
    peak_elements: int
    """of all others, without that copy"""


def is_persistent(parameter: ParameterShape, zero: ZeroConfig) -> bool:
    return parameter.numel <= zero.param_persistence_threshold


def visits(shape: ModelShape, *, recompute: bool) -> list[ModuleShape]:
    """Modules in the order in which one forward and backward come to them, those without own parameters too: DeepSpeed
    prefetches another bucket at each.

    Args:
        recompute: each layer runs forward again just before it runs backward.
    """
    modules = list(shape.modules)
    first_trained_layer = next(p.layer for p in shape.parameters if p.trained)
    # Backward ends where nothing before needs a gradient, such as a frozen embedding; with checkpointing peft makes the
    # embedding's output need one.
    first = 0 if recompute else next(i for i, module in enumerate(modules) if module.layer == first_trained_layer)
    backward: list[ModuleShape] = []
    for layer, group in groupby(reversed(modules[first:]), key=lambda module: module.layer):
        ran = list(group)
        if recompute and layer is not None:
            backward += reversed(ran)
        backward += ran
    return modules + backward


def gathered(
    shape: ModelShape,
    zero: ZeroConfig,
    world_size: int,
    *,
    recompute: bool,
    max_reuse_distance: int = MAX_REUSE_DISTANCE,
) -> Gathered:
    """Nothing is copied with one worker: its slices are the parameters (``NoGatherHandle``)."""
    if world_size == 1:
        return Gathered(0, 0, 0)
    small = [p for p in shape.parameters if is_persistent(p, zero)]
    replay = _Replay(visits(shape, recompute=recompute), frozenset(small), zero, max_reuse_distance)
    peak_bytes, peak_elements = replay.run()
    return Gathered(sum(p.numel * p.itemsize for p in small), peak_bytes, peak_elements)


class _Replay:
    """One pass of DeepSpeed's coordinator over ``order``; persistent parameters are always there and never counted."""

    def __init__(
        self,
        order: Sequence[ModuleShape],
        persistent: frozenset[ParameterShape],
        zero: ZeroConfig,
        max_reuse_distance: int,
    ) -> None:
        self._order = [tuple(p for p in module.parameters if p not in persistent) for module in order]
        self._zero = zero
        self._max_reuse_distance = max_reuse_distance
        self._queue = deque((parameter, step) for step, own in enumerate(self._order) for parameter in own)
        self._last_fetched: dict[ParameterShape, int] = {}
        self._live: set[ParameterShape] = set()
        self._live_elements = self._live_bytes = self._largest_bucket = 0

    def run(self) -> tuple[int, int]:
        """(peak bytes with the largest bucket once more, peak elements) of whole parameters."""
        peak_bytes = peak_elements = 0
        for step, own in enumerate(self._order):
            self._gather([p for p in own if p not in self._live])
            while self._queue and self._queue[0][1] <= step:
                parameter, used_at = self._queue.popleft()
                self._last_fetched[parameter] = used_at
            self._gather(self._next_bucket())
            peak_bytes = max(peak_bytes, self._live_bytes)
            peak_elements = max(peak_elements, self._live_elements)
            self._release(self._leaving(step))
        return peak_bytes + self._largest_bucket, peak_elements

    def _gather(self, parameters: list[ParameterShape]) -> None:
        size = sum(p.numel * p.itemsize for p in parameters)
        self._live.update(parameters)
        self._live_elements += sum(p.numel for p in parameters)
        self._live_bytes += size
        if len(parameters) > 1:  # gathered flat, then copied out; a single one is used as it comes
            self._largest_bucket = max(self._largest_bucket, size)

    def _release(self, parameters: set[ParameterShape]) -> None:
        self._live -= parameters
        self._live_elements -= sum(p.numel for p in parameters)
        self._live_bytes -= sum(p.numel * p.itemsize for p in parameters)

    def _next_bucket(self) -> list[ParameterShape]:
        room = min(self._zero.max_live_parameters - self._live_elements, self._zero.prefetch_bucket_size)
        bucket: dict[ParameterShape, None] = {}
        size = 0
        while self._queue and size < room:
            parameter, step = self._queue.popleft()
            self._last_fetched[parameter] = max(self._last_fetched.get(parameter, -1), step)
            if parameter not in self._live and parameter not in bucket:
                bucket[parameter] = None
                size += parameter.numel
        return list(bucket)

    def _leaving(self, step: int) -> set[ParameterShape]:
        """Those of this module that are neither prefetched for a later use nor used again within the distance."""
        leaving = {p for p in self._order[step] if self._last_fetched.get(p, -1) <= step}
        traversed = 0
        for own in self._order[step + 1 :] if leaving else ():
            if traversed >= self._max_reuse_distance or not leaving:
                break
            leaving -= set(own)
            traversed += sum(p.numel for p in own)
        return leaving
