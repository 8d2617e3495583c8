"""Finds ranks that compute, or read, more slowly than the others, who all wait for them in every step.

In a step every rank's time is that of the slowest, so it tells nothing. Now and then each rank times a small fixed
piece of work of its own, without a collective in it; those times are compared.
"""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

import torch

from trainer.config import WatchdogConfig
from trainer.events import EventKind, EventLog
from trainer.progress_log import ProgressLog

_LEAST_DATA_SHARE = 0.1
"""of its steps that a rank must spend on reading before it can be slow in that"""


class Cause(StrEnum):
    COMPUTING = "computing"
    READING = "reading"


class Look(NamedTuple):
    """What one rank measured."""

    probe_s: float
    data_s: float
    """reading packs, in the steps since the last look"""
    step_s: float
    """those steps"""


def ratios(seconds: Sequence[float]) -> list[float]:
    """Each to the median; of two in the middle to the lower, so that with two ranks one can be slow (pure)."""
    usual = statistics.median_low(seconds)
    return [value / usual if usual > 0 else 1.0 for value in seconds]


def slow(looks: Sequence[Look], ratio: float) -> dict[int, tuple[Cause, float]]:
    """Ranks that were more than ``ratio`` times as slow as the median, with how much, where it matters (pure)."""
    found = {}
    for rank, (look, reading) in enumerate(zip(looks, ratios([look.data_s for look in looks]), strict=True)):
        if reading > ratio and look.data_s > _LEAST_DATA_SHARE * look.step_s:
            found[rank] = (Cause.READING, reading)
    for rank, computing in enumerate(ratios([look.probe_s for look in looks])):
        if computing > ratio:
            found[rank] = (Cause.COMPUTING, computing)
    return found


class Probe:
    """The fixed piece of work: matrix products, some milliseconds of them on a core, one or two on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gpu = device.type == "cuda"
        size, self._times = (2048, 32) if gpu else (256, 8)
        # 24 MiB of a GPU; no random numbers: it leaves their state alone
        self._matrix = torch.full((size, size), 0.01, dtype=torch.bfloat16 if gpu else torch.float32, device=device)
        self._out = torch.empty_like(self._matrix)

    def seconds(self) -> float:
        self._run(1)  # caches are warm, and a GPU's clock is up
        started = time.perf_counter()
        self._run(self._times)
        return time.perf_counter() - started

    def _run(self, times: int) -> None:
        for _ in range(times):
            torch.mm(self._matrix, self._matrix, out=self._out)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Stragglers:
    """Of one attempt on one rank."""

    def __init__(
        self,
        config: WatchdogConfig,
        device: torch.device,
        log: ProgressLog,
        events: EventLog,
        probe: Callable[[], float] | None = None,
    ) -> None:
        self._config = config
        self._device = device
        self._log = log
        self._events = events
        self._probe = probe or Probe(device).seconds
        self._rank = torch.distributed.get_rank()
        self._world_size = torch.distributed.get_world_size()
        self._data_s = self._step_s = 0.0
        self._in_a_row: dict[int, int] = {}
        """looks at which a rank was slow, by rank"""
        self.slowest_ratio: float | None = None
        """of the last look's probes; None before the first"""

    def after_step(self, step: int, seconds_by_part: Mapping[str, float]) -> None:
        """Collective at every so manieth step, else free."""
        self._data_s += seconds_by_part.get("data", 0.0)
        self._step_s += sum(seconds_by_part.values())
        every = self._config.probe_every_steps
        if every is None or step % every or self._world_size == 1:
            return
        looks = self._gathered(Look(self._probe(), self._data_s, self._step_s))
        self._data_s = self._step_s = 0.0
        self.slowest_ratio = max(ratios([look.probe_s for look in looks]))
        found = slow(looks, self._config.slow_ratio)
        self._in_a_row = {rank: self._in_a_row.get(rank, 0) + 1 for rank in found}
        if self._in_a_row.get(self._rank) == self._config.slow_looks:
            self._tell(step, *found[self._rank])

    def _gathered(self, mine: Look) -> list[Look]:
        """Of all ranks."""
        here = torch.tensor(mine, dtype=torch.float64, device=self._device)
        everywhere = [torch.empty_like(here) for _ in range(self._world_size)]
        torch.distributed.all_gather(everywhere, here)
        return [Look(*look.tolist()) for look in everywhere]

    def _tell(self, step: int, cause: Cause, ratio: float) -> None:
        """By the slow rank itself, which knows where it is."""
        node = socket.gethostname()
        text = (
            f"rank {self._rank} on {node} is slow: {cause.value} takes it {ratio:.1f} times as long as the median "
            f"rank, at {self._config.slow_looks} looks in a row, and all others wait for it. Look at that machine "
            "(clocks, temperature, neighbours, its disk or network)"
        )
        self._log.warn(f"step {step}: {text}")
        self._events.record(EventKind.STRAGGLER, text, step=step, node=node, cause=cause.value, ratio=ratio)
