"""One worker of one attempt, from a spec to a finished loop, whoever started the process."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import NamedTuple

import torch.distributed as dist

from data_shards.errors import BatonError
from data_shards.order.sampler import Sampler
from data_shards.prepare import TRAIN, VALIDATION
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from trainer import oom_kills
from trainer.attempt_saves import cadence_of, draft, open_fast_tier, open_saver, watched_room
from trainer.checkpoint import CheckpointRef
from trainer.checkpoint_manifest import Progress
from trainer.checkpointing import Checkpointing
from trainer.config import (
    EvaluationConfig,
    TrainerConfig,
    TrainingConfig,
    WorkerSpec,
)
from trainer.deepspeed_config import deepspeed_config
from trainer.deterministic import make_deterministic
from trainer.engine import ZeroEngine, build_optimizer
from trainer.evaluation_worker import evaluate_model
from trainer.evaluations import ended_early, is_missing
from trainer.events import EventKind, EventLog
from trainer.loop import Loop, Outcome
from trainer.metrics import MetricsSink, NoMetrics, Reporter
from trainer.model import model_to_train
from trainer.out_of_memory import named
from trainer.process_group import leave_process_group, node_id, start_process_group
from trainer.progress_log import ProgressLog, say
from trainer.pulse import Pulse
from trainer.resume import find_resumed, restore
from trainer.room import EndlessRoom
from trainer.run_directory import RunDirectory, WorkerError, utc_now, write_json
from trainer.shared_storage import check_shared
from trainer.stop_signal import StopSignal
from trainer.stragglers import Stragglers
from trainer.watchdog import open_watch


def total_rows(training: TrainingConfig, num_rows: int) -> int:
    """Positions over all epochs at which the run ends."""
    if training.steps is not None:
        return training.steps * training.global_batch
    return max(1, round(training.epochs * num_rows))  # type: ignore[operator]


def build_engine(config: TrainerConfig) -> ZeroEngine:
    zero = deepspeed_config(config.model.precision, config.optimizer.max_grad_norm, config.zero)
    model = model_to_train(config, zero)
    return ZeroEngine(model, build_optimizer(model, config.optimizer), zero)


class _Data(NamedTuple):
    train: SplitReader
    validation: SplitReader | None
    sampler: Sampler


def _open_data(spec: WorkerSpec) -> _Data:
    config, dataset = spec.trainer, Storage.at(spec.dataset_uri)
    manifest = read_dataset_manifest(dataset)
    source = SplitReader(dataset, manifest, TRAIN)
    held_out = SplitReader(dataset, manifest, VALIDATION) if manifest.has_rows(VALIDATION) else None
    sampler = Sampler(
        source.num_rows,
        config.seed,
        config.training.global_batch,
        total_rows(config.training, source.num_rows),
        spec.order,
        manifest.splits[TRAIN].source_rows(spec.weights),
    )
    return _Data(source, held_out, sampler)


def _saved_step(resumed: CheckpointRef | None, data: _Data, config: EvaluationConfig) -> int | None:
    """The step that need not be saved durably again; None: there is none. An evaluation that is made up may be all that
    is left to do, and then that has to be saved."""
    if resumed is None:
        return 0
    progress = resumed.manifest.progress
    lacks_evaluation = data.validation is not None and is_missing(progress, config, data.sampler.num_steps)
    return None if resumed.manifest.fast or lacks_evaluation else progress.step


def _record_end(attempt: Storage, loop: Loop, outcome: Outcome, events: EventLog) -> None:
    step = loop.progress.step
    if outcome == Outcome.STOPPED:
        events.record(EventKind.SAVED if loop.saved else EventKind.SAVE_SKIPPED, f"step {step}", step=step)
    end = {"outcome": outcome.value, "at": utc_now(), "progress": asdict(loop.progress)}
    if outcome == Outcome.FINISHED:
        end["reason"] = ended_early(loop.progress, loop.config.evaluation, loop.sampler.num_steps)
    write_json(attempt, "end.json", end)


def train(spec: WorkerSpec, metrics: MetricsSink, pulse: Pulse) -> Outcome:
    """Build everything for this rank and run the loop to its end."""
    config: TrainerConfig = spec.trainer
    run = RunDirectory.at(spec.run_uri)
    if config.training.deterministic:
        make_deterministic()
    check_shared(run.attempt(spec.attempt), dist.get_rank(), dist.get_world_size())
    # From here on: a notice may come while the model is read, and its seconds count.
    stop = StopSignal(run, spec.attempt, dist.get_rank(), spec.notice_file, node_id())
    fast = open_fast_tier(run, spec)
    resumed = find_resumed(run, spec)
    engine = build_engine(config)
    data = _open_data(spec)
    sampler = data.sampler
    log = ProgressLog(run.attempt(spec.attempt), sampler.num_steps, config.training.log_every, enabled=engine.rank == 0)
    saver = open_saver(run, spec, engine, fast)
    restore(engine, run, spec, saver.staging, resumed)
    progress = resumed.manifest.progress if resumed else Progress()
    log.say(
        f"training {sum(p.numel for p in engine.trained):,} parameters on {engine.world_size} workers "
        f"({engine.device.type}), from step {progress.step} of {sampler.num_steps}"
    )
    sink = metrics if engine.rank == 0 else NoMetrics()
    reporter = Reporter(sink, spec.attempt, progress, num_steps=sampler.num_steps, world_size=engine.world_size)
    reporter.began(resumed.manifest if resumed and not resumed.manifest.fast else None)
    events = EventLog(run, spec.attempt, engine.rank)
    room = watched_room(run, spec.attempt, config, engine, saver, log) if engine.rank == 0 else EndlessRoom()
    cadence, saved_step = cadence_of(config.checkpoint, fast), _saved_step(resumed, data, config.evaluation)
    checkpointing = Checkpointing(saver, room, cadence, saved_step, partial(draft, spec), log, reporter)
    loop = Loop(
        engine,
        config,
        sampler,
        data.train,
        data.validation,
        progress,
        checkpointing,
        stop,
        log,
        reporter,
        pulse,
        events if engine.rank == 0 else None,
        Stragglers(config.watchdog, engine.device, log, events),
    )
    if engine.rank == 0:
        where, size = f"from step {progress.step}", engine.world_size
        events.record(EventKind.TRAINING, where, step=progress.step, num_workers=size, device=engine.device.type)
    try:
        outcome = loop.run()
    finally:
        stop.close()
        checkpointing.close()
    if engine.rank == 0:
        _record_end(run.attempt(spec.attempt), loop, outcome, events)
    if fast and outcome == Outcome.FINISHED:
        fast.leave()
    return outcome


def run_worker(spec: WorkerSpec, metrics: MetricsSink | None = None) -> Outcome:
    """What the spec asks for, in a process group, leaving an error report in the attempt's folder if it fails."""
    rank = int(os.environ.get("RANK", "0"))
    say(f"worker rank {rank} of {os.environ.get('WORLD_SIZE', '1')}: pid {os.getpid()}")
    kills_before = oom_kills.count()
    run, pulse = RunDirectory.at(spec.run_uri), Pulse()
    config = spec.trainer
    watch = open_watch(
        config.watchdog, run, spec.attempt, pulse, rank=rank, commit_timeout_s=config.checkpoint.commit_timeout_s
    )
    try:
        with suppress(OSError):  # for the driver, which without it asks nobody to save when this machine goes
            RunDirectory.at(spec.run_uri).write_place(spec.attempt, rank, node_id())
        start_process_group(spec.collective_timeout_s)
        if spec.evaluation is not None:
            evaluate_model(spec, pulse)
            outcome = Outcome.FINISHED
        else:
            outcome = train(spec, metrics or NoMetrics(), pulse)
        leave_process_group()
        return outcome
    except Exception as raised:
        watch.close()
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        error = named(raised, spec, pulse, rank=rank, world_size=world_size)
        if not isinstance(error, BatonError) and (kills := oom_kills.told(kills_before)):
            error.add_note(kills)
        with suppress(OSError):  # a full disk must not hide what really went wrong
            run.write_error(spec.attempt, WorkerError.of(rank, error, step=pulse.step or None))
        if error is raised:
            raise
        raise error from raised
    finally:
        watch.close()
