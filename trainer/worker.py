"""One worker of one attempt, from a spec to a finished loop, whoever started the process."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch.distributed as dist

from data_shards.errors import CorruptFile
from data_shards.order.sampler import Sampler
from data_shards.prepare import TRAIN, VALIDATION
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from trainer import checkpoint
from trainer.base_identity import refuse_other_base
from trainer.checkpoint import CheckpointRef
from trainer.checkpoint_manifest import CheckpointManifest, Progress
from trainer.checkpointing import Cadence, Checkpointing
from trainer.config import (
    STATE_KEYS,
    CheckpointConfig,
    Method,
    TrainerConfig,
    TrainingConfig,
    WorkerSpec,
)
from trainer.deepspeed_config import deepspeed_config
from trainer.deterministic import make_deterministic
from trainer.disk_plan import checkpoint_bytes
from trainer.engine import ZeroEngine, build_optimizer
from trainer.errors import CheckpointCorrupt, ModelError
from trainer.evaluation_worker import evaluate_model
from trainer.fast_tier import FastTier, bring_together
from trainer.loop import Loop, Outcome
from trainer.metrics import MetricsSink, NoMetrics, Reporter
from trainer.model import build_trained_model, locate_base
from trainer.model_shape import FP32, ParameterShape
from trainer.process_group import leave_process_group, start_process_group
from trainer.progress_log import ProgressLog, say_on_first_rank
from trainer.retention import Sparing, prune
from trainer.room import EndlessRoom, Room
from trainer.run_directory import RunDirectory, WorkerError, utc_now, write_json
from trainer.saving import Saver
from trainer.shared_storage import check_shared
from trainer.staging import Staging
from trainer.stop_signal import StopSignal

_FILES_BYTES = 64 * 1024
"""What a rank writes beside its files: receipt, its part of the manifest, step records."""
_VERSIONED = ("torch", "deepspeed", "transformers", "peft", "ray", "pyarrow")


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # Ray need not be there under torchrun
    return found


def total_rows(training: TrainingConfig, num_rows: int) -> int:
    """Positions over all epochs at which the run ends."""
    if training.steps is not None:
        return training.steps * training.global_batch
    return max(1, round(training.epochs * num_rows))  # type: ignore[operator]


def build_engine(spec: WorkerSpec) -> ZeroEngine:
    config = spec.trainer
    zero = deepspeed_config(config.model.precision, config.optimizer.max_grad_norm, config.zero)
    model = build_trained_model(
        locate_base(config.model),
        config.model,
        config.training.method,
        config.training.lora,
        zero,
        seed=config.seed,
        say=say_on_first_rank,
    )
    return ZeroEngine(model, build_optimizer(model, config.optimizer), zero)


def find_resumed(run: RunDirectory, spec: WorkerSpec) -> CheckpointRef | None:
    """The run's own checkpoint that the attempt continues from, within every rank's reach; before the model is built,
    as the next attempt may have to take another one. Collective.

    Raises ModelError where it was trained from another base, CheckpointUnusable where it can't be read.
    """
    if spec.resume_from is None:
        return None
    try:
        ref = checkpoint.read_manifest(run.checkpoints, spec.resume_from)
    except CorruptFile as error:  # since the driver looked
        raise CheckpointCorrupt(spec.resume_from, str(error)) from error
    _check_base(spec, ref)
    if ref.manifest.fast:
        bring_together(run.checkpoints, ref)
    return ref


def restore(
    engine: ZeroEngine, run: RunDirectory, spec: WorkerSpec, staging: Staging, resumed: CheckpointRef | None
) -> None:
    """Load what the attempt begins with."""
    if resumed is not None:
        checkpoint.load(engine, run.checkpoints, resumed, staging)
    elif spec.init_from is not None:
        source, name = Storage.holding(spec.init_from)
        ref = checkpoint.read_manifest(source, name)
        if spec.trainer.training.method == Method.LORA:  # a full checkpoint takes the base's place altogether
            _check_base(spec, ref)
        try:
            checkpoint.load(engine, source, ref, staging, weights_only=True)
        except CheckpointCorrupt as error:  # not one of this run's, so nothing else can take its place
            raise ModelError(f"init_from={spec.init_from}: {error}; `baton checkpoints verify` tells more") from error


def _check_base(spec: WorkerSpec, ref: CheckpointRef) -> None:
    if not spec.other_base:
        refuse_other_base(spec.base_identity, ref.name, ref.manifest.base)


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


class _Data(NamedTuple):
    train: SplitReader
    validation: SplitReader | None
    sampler: Sampler


def _open_data(spec: WorkerSpec) -> _Data:
    config, dataset = spec.trainer, Storage.at(spec.dataset_uri)
    manifest = read_dataset_manifest(dataset)
    source = SplitReader(dataset, manifest, TRAIN)
    held_out = manifest.splits.get(VALIDATION)
    sampler = Sampler(
        source.num_rows,
        config.seed,
        config.training.global_batch,
        total_rows(config.training, source.num_rows),
        spec.order,
        manifest.splits[TRAIN].source_rows(spec.weights),
    )
    return _Data(source, SplitReader(dataset, manifest, VALIDATION) if held_out and held_out.rows else None, sampler)


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


def _cadence(config: CheckpointConfig, fast: FastTier | None) -> Cadence:
    if config.fast is None or fast is None:
        return Cadence(config.every_steps)
    return Cadence(config.every_steps, config.fast.every_steps, fast.folder.uri)


def _leave_fast_tier(fast: FastTier, run: RunDirectory, config: CheckpointConfig, attempt: str) -> None:
    """The run has ended, and its last checkpoint is durable. Collective."""
    try:
        if dist.get_rank() == 0:
            prune(run, config, attempt, Sparing.FINISHED)
        dist.barrier()
        fast.leave()
    except OSError as error:
        ProgressLog.warn(f"{fast.folder.uri} could not be cleared: {error}")


def train(spec: WorkerSpec, metrics: MetricsSink) -> Outcome:
    """Build everything for this rank and run the loop to its end."""
    config: TrainerConfig = spec.trainer
    run = RunDirectory.at(spec.run_uri)
    if config.training.deterministic:
        make_deterministic()
    check_shared(run.attempt(spec.attempt), dist.get_rank(), dist.get_world_size())
    fast = FastTier.open(config.checkpoint.fast.path, run) if config.checkpoint.fast else None
    resumed = find_resumed(run, spec)
    engine = build_engine(spec)
    data = _open_data(spec)
    sampler = data.sampler
    log = ProgressLog(run.attempt(spec.attempt), sampler.num_steps, config.training.log_every, enabled=engine.rank == 0)
    saver = Saver(
        engine,
        run.checkpoints,
        commit_timeout_s=config.checkpoint.commit_timeout_s,
        committed=partial(prune, run, config.checkpoint, spec.attempt),
        clear_node=fast.clear if fast else lambda name: None,
    )
    num_states = len(STATE_KEYS[config.optimizer.name])
    saver.staging.reserve(engine.num_local_elements * (1 + num_states))
    restore(engine, run, spec, saver.staging, resumed)
    progress = resumed.manifest.progress if resumed else Progress()
    log.say(
        f"training {sum(p.numel for p in engine.trained):,} parameters on {engine.world_size} workers "
        f"({engine.device.type}), from step {progress.step} of {sampler.num_steps}"
    )
    sink = metrics if engine.rank == 0 else NoMetrics()
    reporter = Reporter(sink, spec.attempt, progress, num_steps=sampler.num_steps, world_size=engine.world_size)
    reporter.began(resumed.manifest if resumed else None)
    stop = StopSignal(run, spec.attempt, watch=engine.rank == 0)
    room = watched_room(run, spec.attempt, config, engine, saver, log) if engine.rank == 0 else EndlessRoom()
    saved_step = None if resumed and resumed.manifest.fast else progress.step
    cadence = _cadence(config.checkpoint, fast)
    checkpointing = Checkpointing(saver, room, cadence, saved_step, partial(draft, spec), log, reporter)
    loop = Loop(
        engine,
        config,
        sampler,
        data.train,
        data.validation,
        progress,
        checkpointing,
        lambda: stop.requested,
        log,
        reporter,
    )
    try:
        outcome = loop.run()
    finally:
        stop.close()
        checkpointing.close()
    if fast and outcome == Outcome.FINISHED:
        _leave_fast_tier(fast, run, config.checkpoint, spec.attempt)
    if engine.rank == 0:
        end = {"outcome": outcome.value, "at": utc_now(), "progress": asdict(loop.progress)}
        write_json(run.attempt(spec.attempt), "end.json", end)
    return outcome


def run_worker(spec: WorkerSpec, metrics: MetricsSink | None = None) -> Outcome:
    """What the spec asks for, in a process group, leaving an error report in the attempt's folder if it fails."""
    rank = int(os.environ.get("RANK", "0"))
    print(f"{utc_now()} worker rank {rank} of {os.environ.get('WORLD_SIZE', '1')}: pid {os.getpid()}", flush=True)
    try:
        start_process_group(spec.collective_timeout_s)
        if spec.evaluation is not None:
            evaluate_model(spec)
            outcome = Outcome.FINISHED
        else:
            outcome = train(spec, metrics or NoMetrics())
        leave_process_group()
        return outcome
    except Exception as error:
        with suppress(OSError):  # a full disk must not hide what really went wrong
            RunDirectory.at(spec.run_uri).write_error(spec.attempt, WorkerError.of(rank, error))
        raise
