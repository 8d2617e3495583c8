"""The real training loop over a tiny model on two workers, which saves every fourth of its 24 steps, and whose storage
gives trouble."""

from __future__ import annotations

import errno
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data_shards.order.sampler import Sampler
from data_shards.retry import ONE_MINUTE, Patience
from data_shards.storage import Storage
from tests.support.checkpoints import committed
from tests.support.engines import ADAMW, make_engine
from tests.support.tiny import DRAFT, MemoryPacks, ragged_packs
from trainer import checkpoint
from trainer.attempt_saves import watched_room
from trainer.checkpoint_manifest import CheckpointManifest, Progress
from trainer.checkpointing import Cadence, Checkpointing
from trainer.config import STATE_KEYS, TrainerConfig
from trainer.engine import ZeroEngine
from trainer.loop import Loop
from trainer.metrics import NoMetrics, Reporter
from trainer.progress_log import ProgressLog
from trainer.rank_file import RankFile
from trainer.retention import prune
from trainer.room import EndlessRoom
from trainer.run_directory import AttemptStart, RunDirectory, write_json
from trainer.saving import SaveFailed, Saver

PACKS = ragged_packs(19, seed=3)
STEPS, EVERY = 24, 4


class Packs(MemoryPacks):
    def prefetch(self, rows: np.ndarray) -> None:
        """They are there."""


class FailingDisk:
    """Stands in for ``write_tensors`` in this process: fails at some steps, or waits until it is let go on."""

    def __init__(
        self,
        *,
        fails_at: tuple[int, ...] = (),
        times: float = math.inf,
        held: threading.Event | None = None,
        errno: int = errno.EIO,
    ) -> None:
        """``times``: after so many failures, all steps together, it is well again."""
        self.fails_at, self.times, self.held, self.errno, self.fired = fails_at, times, held, errno, 0
        self._write = checkpoint.write_tensors
        checkpoint.write_tensors = self  # type: ignore[assignment]

    def __call__(self, target: Storage, *args: Any, **options: Any) -> Any:
        step = int(target.uri.rsplit("/", 1)[-1].split("-")[0])
        if self.held is not None:
            assert self.held.wait(60)
        if step in self.fails_at and self.fired < self.times:
            self.fired += 1
            raise OSError(self.errno, os.strerror(self.errno), target.uri)
        return self._write(target, *args, **options)


@dataclass(frozen=True)
class Setting:
    """What is out of the ordinary in a loop."""

    disk: Mapping[str, Any] = field(default_factory=dict)
    """of rank 1: what makes a ``FailingDisk``"""
    held_until: int | None = None
    """step at which that disk is let go on"""
    retention: Callable[[], object] | None = None
    saves: Mapping[str, Any] = field(default_factory=dict)
    """of the configuration's section ``checkpoint``"""
    patience: Patience = ONE_MINUTE
    wait_s: float = 0.5
    """at most, before each step, for a save under way or for room: tiny steps are faster than a file system"""


class Looped(NamedTuple):
    """What became of a loop on one rank."""

    outcome: str
    """or the error that ended it"""
    step: int
    fired: int
    """times that the disk failed"""
    warned: list[str]
    said: list[str]
    steps_behind: list[int]
    """steps that were begun while a save was under way"""


def draft_of(progress: Progress) -> CheckpointManifest:
    return replace(DRAFT, progress=progress)


def saver_of(
    engine: ZeroEngine,
    checkpoints: Storage,
    commit_timeout_s: float = 60,
    committed: Callable[[], object] = lambda: None,
) -> Saver:
    saver = Saver(engine, checkpoints, commit_timeout_s=commit_timeout_s, committed=committed)
    saver.staging.reserve(engine.num_local_elements * (1 + len(STATE_KEYS[ADAMW.name])))
    return saver


@dataclass
class NeverStops:
    """Is asked before each step whether the loop should end."""

    before_step: Callable[[], None]
    seconds_left: float = math.inf

    @property
    def requested(self) -> bool:
        self.before_step()
        return False


def looped(base: str, root: str, setting: Setting) -> Looped:
    """A loop of one attempt, ``a1``, whose run is in ``root``, a path or a URI."""
    engine, let_go = make_engine(base, ADAMW), threading.Event()
    warned: list[str] = []
    said: list[str] = []
    behind: list[int] = []
    ProgressLog.warn = staticmethod(warned.append)  # type: ignore[assignment]
    ProgressLog.say = lambda self, text: said.append(text)  # type: ignore[method-assign]
    first, mine = engine.rank == 0, engine.rank == 1
    held = let_go if mine and setting.held_until else None
    failing = FailingDisk(**setting.disk if mine else {}, held=held)
    config = TrainerConfig.model_validate(
        {
            "model": {"base": base},
            "training": {"steps": STEPS, "global_batch": 6, "micro_batch": 2},
            "optimizer": ADAMW.model_dump(),
            "checkpoint": {"every_steps": EVERY, "keep_last": 100, **setting.saves},
            "seed": 5,
        }
    )
    run = RunDirectory(Storage.at(root, setting.patience))
    if first:
        write_json(run.attempt("a1"), "start.json", asdict(AttemptStart("a1", None, 1, 0, "", None)))
    torch.distributed.barrier()
    loop: Loop
    retention = setting.retention or partial(prune, run, config.checkpoint, "a1")
    saver = saver_of(engine, run.checkpoints, committed=retention)
    log = ProgressLog(run.attempt("a1"), STEPS, 8, enabled=first)
    room = watched_room(run, "a1", config, engine, saver, log) if first else EndlessRoom()
    reporter = Reporter(NoMetrics(), "a1", Progress(), num_steps=STEPS, world_size=2)

    def before_step() -> None:
        step = loop.progress.step
        if setting.held_until is not None and step >= setting.held_until:
            let_go.set()
        if saver.busy:
            behind.append(step + 1)
        wait_until = time.monotonic() + setting.wait_s
        while (
            setting.held_until is None
            and (saver.busy or (first and room._wanted.is_set()))
            and time.monotonic() < wait_until
        ):
            time.sleep(0.005)

    loop = Loop(
        engine,
        config,
        Sampler(num_rows=19, seed=5, global_batch=6, total_rows=6 * STEPS),
        Packs(PACKS.all),  # type: ignore[arg-type]
        None,
        Progress(),
        Checkpointing(saver, room, Cadence(EVERY), 0, draft_of, log, reporter),
        NeverStops(before_step),
        log,
        reporter,
    )
    try:
        outcome = str(loop.run())
    except SaveFailed as error:
        outcome = f"{type(error).__name__}: {error}"
    return Looped(outcome, loop.progress.step, failing.fired, warned, said, behind)


def committed_steps(root: str | Path) -> list[int]:
    return [ref.step for ref in committed(RunDirectory.at(str(root)).checkpoints)]


def last_files(root: str | Path) -> tuple[RankFile, ...]:
    """Of the newest checkpoint, with their hashes: the state at its step."""
    return committed(RunDirectory.at(str(root)).checkpoints)[-1].manifest.files


def recorded_steps(root: str | Path) -> list[int]:
    """Of the attempt's step records, in the order of their files."""
    records = RunDirectory.at(str(root)).attempt("a1").child("steps")
    return [json.loads(line)["step"] for name in records.list() for line in records.read(name).splitlines()]
