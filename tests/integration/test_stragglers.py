"""Fault 40: of two real processes the slow one is named, with its node; of two that are equally fast none is."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import torch

from tests.support.distributed import run_workers
from trainer.config import WatchdogConfig
from trainer.events import EventKind, EventLog, read_events
from trainer.progress_log import ProgressLog
from trainer.run_directory import RunDirectory
from trainer.stragglers import Probe, Stragglers

EVERY, STEPS, TIMES = 5, 40, 40
"""The slow rank's probe takes so many times as long: far more than other work on this machine makes of it."""


def looked(root: str, slow_rank: int | None, reading_rank: int | None) -> tuple[list[str], float | None]:
    """What this rank warned of, and the slowest rank's ratio at the last look."""
    rank, warned = torch.distributed.get_rank(), []
    probe = Probe(torch.device("cpu"))
    ProgressLog.warn = staticmethod(warned.append)  # type: ignore[assignment]
    run = RunDirectory.at(root)

    def seconds() -> float:
        started = time.perf_counter()
        for _ in range(TIMES if rank == slow_rank else 1):
            probe.seconds()
        return time.perf_counter() - started

    config = WatchdogConfig(probe_every_steps=EVERY, slow_ratio=4, slow_looks=3)
    log = ProgressLog(run.attempt("a1"), STEPS, 1, enabled=rank == 0)
    stragglers = Stragglers(config, torch.device("cpu"), log, EventLog(run, "a1", rank), seconds)
    for step in range(1, STEPS + 1):
        data_s = 0.5 if rank == reading_rank else 0.01
        stragglers.after_step(step, {"data": data_s, "forward_backward": 1.0 - data_s})
        assert (stragglers.slowest_ratio is None) == (step < EVERY)
    return warned, stragglers.slowest_ratio


def test_the_slow_rank_is_named_once(tmp_path: Path) -> None:
    (quiet, ratio), (warned, same) = run_workers(looked, 2, str(tmp_path), 1, None)
    assert quiet == [] and ratio == same and ratio is not None and ratio > 2
    (line,) = warned
    assert line.startswith(f"step {3 * EVERY}: rank 1 on {socket.gethostname()} is slow: computing takes it")
    (event,) = read_events(RunDirectory.at(str(tmp_path)), "a1")
    assert event.kind == EventKind.STRAGGLER and event.rank == 1 and event.details["cause"] == "computing"


def test_a_rank_that_reads_slowly_is_named(tmp_path: Path) -> None:
    (line,), _ = run_workers(looked, 2, str(tmp_path), None, 0)[0]
    assert "rank 0 on" in line and "reading takes it 50.0 times" in line


def test_equal_ranks_raise_no_alarm(tmp_path: Path) -> None:
    results = run_workers(looked, 2, str(tmp_path), None, None)
    assert [warned for warned, _ in results] == [[], []] and read_events(RunDirectory.at(str(tmp_path)), "a1") == []
    print(f"slowest rank's ratio at the last look: {results[0][1]:.2f}")
