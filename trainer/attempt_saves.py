"""What the saves of an attempt are made of: saver, room on the disk, tiers, and what a checkpoint says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from data_shards.storage import Storage
from trainer.checkpoint_manifest import CheckpointManifest, Progress
from trainer.checkpointing import Cadence
from trainer.config import STATE_KEYS, CheckpointConfig, TrainerConfig, WorkerSpec
from trainer.disk_plan import checkpoint_bytes
from trainer.engine import ZeroEngine
from trainer.fast_tier import FastTier
from trainer.model_shape import FP32, ParameterShape
from trainer.progress_log import ProgressLog
from trainer.retention import Sparing, prune
from trainer.room import Room
from trainer.run_directory import RunDirectory, utc_now
from trainer.saving import Saver
from trainer.versions import versions

_FILES_BYTES = 64 * 1024
"""What a rank writes beside its files: receipt, its part of the manifest, step records."""


def draft(spec: WorkerSpec, progress: Progress) -> CheckpointManifest:
    """What a checkpoint says beside its tensors."""
    return CheckpointManifest(
        attempt=spec.attempt,
        created=utc_now(),
        world_size=0,
        parameters=(),
        optimizer={"name": spec.trainer.optimizer.name.value},
        progress=progress,
        fingerprint=spec.fingerprint,
        base=spec.base_identity,
        config=spec.resolved_config,
        versions=versions(),
        files=(),
    )


def open_saver(run: RunDirectory, spec: WorkerSpec, engine: ZeroEngine, fast: FastTier | None) -> Saver:
    """With host memory that is there already when the first save is due."""
    config = spec.trainer
    saver = Saver(
        engine,
        run.checkpoints,
        commit_timeout_s=config.checkpoint.commit_timeout_s,
        committed=partial(prune, run, config.checkpoint, spec.attempt),
        clear_node=fast.clear if fast else lambda name: None,
    )
    num_states = len(STATE_KEYS[config.optimizer.name])
    saver.staging.reserve(engine.num_local_elements * (1 + num_states))
    return saver


def watched_room(
    run: RunDirectory, attempt: str, config: TrainerConfig, engine: ZeroEngine, saver: Saver, log: ProgressLog
) -> Room:
    """On the disk that holds the run's checkpoints, as rank 0 looks after it."""
    path = run.storage.local_path

    def free_bytes() -> int | None:
        return shutil.disk_usage(path).free if path is not None else None

    shapes = [ParameterShape(p.name, p.shape, FP32, True) for p in engine.trained]
    room = Room(
        checkpoint_bytes(shapes, engine.world_size, STATE_KEYS[config.optimizer.name])
        + engine.world_size * _FILES_BYTES,
        free_bytes,
        saver.discard_last,
        partial(prune, run, config.checkpoint, attempt, Sparing.NEWEST),
        log.warn,
    )
    room.watch()
    return room


def cadence_of(config: CheckpointConfig, fast: FastTier | None) -> Cadence:
    if config.fast is None or fast is None:
        return Cadence(config.every_steps)
    return Cadence(config.every_steps, config.fast.every_steps, fast.folder.uri)


def end_fast_tier(fast: FastTier, run: RunDirectory, config: CheckpointConfig, attempt: str) -> None:
    """The run has ended, and its last checkpoint is durable. Collective."""
    if dist.get_rank() == 0:
        _told_if_it_fails(lambda: prune(run, config, attempt, Sparing.FINISHED), run.checkpoints)
    dist.barrier()
    _told_if_it_fails(fast.leave, fast.folder)


def _told_if_it_fails(action: Callable[[], object], where: Storage) -> None:
    try:
        action()
    except OSError as error:
        ProgressLog.warn(f"{where.uri} could not be cleared: {error}")
