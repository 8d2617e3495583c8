"""One worker of one attempt, from a spec to a finished loop, whoever started the process."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import partial

from data_shards.prepare import TRAIN, VALIDATION
from data_shards.sampler import Sampler
from data_shards.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from trainer import checkpoint
from trainer.checkpoint_manifest import CheckpointManifest, Progress
from trainer.config import TrainerConfig, TrainingConfig, WorkerSpec
from trainer.deepspeed_config import deepspeed_config
from trainer.deterministic import make_deterministic
from trainer.engine import ZeroEngine, build_optimizer
from trainer.evaluation_worker import evaluate_model
from trainer.loop import Loop, Outcome
from trainer.metrics import MetricsSink, NoMetrics, Reporter
from trainer.model import build_trained_model, locate_base
from trainer.process_group import start_process_group
from trainer.progress_log import ProgressLog
from trainer.run_directory import RunDirectory, WorkerError, utc_now, write_json
from trainer.stop_signal import StopSignal

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
        locate_base(config.model), config.model, config.training.method, config.training.lora, zero, seed=config.seed
    )
    return ZeroEngine(model, build_optimizer(model, config.optimizer), zero)


def restore(engine: ZeroEngine, run: RunDirectory, spec: WorkerSpec) -> CheckpointManifest | None:
    """Load what the attempt begins with. Returns the manifest of the run's own checkpoint, if it continues from one."""
    if spec.resume_from is not None:
        ref = checkpoint.read_manifest(run.checkpoints, spec.resume_from)
        checkpoint.load(engine, run.checkpoints, ref)
        return ref.manifest
    if spec.init_from is not None:
        source, name = Storage.holding(spec.init_from)
        checkpoint.load(engine, source, checkpoint.read_manifest(source, name), weights_only=True)
    return None


def save(engine: ZeroEngine, run: RunDirectory, spec: WorkerSpec, progress: Progress) -> CheckpointManifest:
    draft = CheckpointManifest(
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
    ref = checkpoint.save(engine, run.checkpoints, draft)
    if engine.rank == 0:
        run.prune(spec.trainer.checkpoint.keep_last)
    return ref.manifest


def train(spec: WorkerSpec, metrics: MetricsSink) -> Outcome:
    """Build everything for this rank and run the loop to its end."""
    config: TrainerConfig = spec.trainer
    run = RunDirectory.at(spec.run_uri)
    if config.training.deterministic:
        make_deterministic()
    engine = build_engine(spec)
    dataset = Storage.at(spec.dataset_uri)
    manifest = read_dataset_manifest(dataset)
    source = SplitReader(dataset, manifest, TRAIN)
    held_out = manifest.splits.get(VALIDATION)
    validation = SplitReader(dataset, manifest, VALIDATION) if held_out and held_out.rows else None
    sampler = Sampler(
        source.num_rows,
        config.seed,
        config.training.global_batch,
        total_rows(config.training, source.num_rows),
        spec.order,
        manifest.splits[TRAIN].source_rows(spec.weights),
    )
    log = ProgressLog(run.attempt(spec.attempt), sampler.num_steps, config.training.log_every, enabled=engine.rank == 0)
    resumed = restore(engine, run, spec)
    progress = resumed.progress if resumed else Progress()
    log.say(
        f"training {sum(p.numel for p in engine.trained):,} parameters on {engine.world_size} workers "
        f"({engine.device.type}), from step {progress.step} of {sampler.num_steps}"
    )
    sink = metrics if engine.rank == 0 else NoMetrics()
    reporter = Reporter(sink, spec.attempt, progress, num_steps=sampler.num_steps, world_size=engine.world_size)
    reporter.began(resumed)
    stop = StopSignal(run, spec.attempt, watch=engine.rank == 0)
    loop = Loop(
        engine,
        config,
        sampler,
        source,
        validation,
        progress,
        partial(save, engine, run, spec),
        lambda: stop.requested,
        log,
        reporter,
    )
    try:
        outcome = loop.run()
    finally:
        stop.close()
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
            return Outcome.FINISHED
        return train(spec, metrics or NoMetrics())
    except Exception as error:
        with suppress(OSError):  # a full disk must not hide what really went wrong
            RunDirectory.at(spec.run_uri).write_error(spec.attempt, WorkerError.of(rank, error))
        raise
