"""Everything that a run needs before workers start: base, data, place, and whether it may go on where it stopped."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster.config import Launcher
from cluster.doing import Doing, DoingKind, write_doing
from cluster.failures import ALL_STEPS_DONE, Action
from cluster.lease import Lease
from data_shards.encoding.encoder import Encoder, load_tokenizer, stop_tokens
from data_shards.errors import BadInput
from data_shards.order.mixture import MIXTURE_VERSION
from data_shards.order.sampler import Sampler
from data_shards.prepare import TRAIN, VALIDATION, Prepared, prepare
from data_shards.storage import Storage
from launch.cli import under_torchrun
from launch.compatibility import allowed, differences, refused
from launch.config import Config
from launch.export import export_folder, export_run, missing_exports
from launch.places import at_commit, base_notes, checkpoint_to_export, open_run_to_write
from trainer.base_identity import BaseIdentity, base_identity, refuse_other_base
from trainer.base_location import locate_base
from trainer.checkpoint import CheckpointRef, read_manifest
from trainer.checkpoint_manifest import Progress
from trainer.config import Method, WorkerSpec
from trainer.evaluations import ended_early, is_missing
from trainer.model import max_positions, model_config
from trainer.run_directory import RunDirectory, Say, read_json, utc_now, write_json
from trainer.survey import durable_checkpoints, newest_usable
from trainer.versions import versions
from trainer.worker import total_rows

_BASE_KEY = "model.base"
_BATCH_KEY = "training.global_batch"
_AT_STEP = re.compile(r"(.+)@(\d+)")


@dataclass(frozen=True)
class Job:
    config: Config
    run: RunDirectory
    base: Path
    base_identity: BaseIdentity
    dataset: Prepared
    init_from: str | None
    """URI of the checkpoint to begin with, looked up when the run began: its source may have gone on since"""

    @property
    def other_base(self) -> bool:
        """Whether a checkpoint that was trained from another base may be gone on from, on purpose."""
        return allowed(_BASE_KEY, self.config.resume.allow)

    @property
    def sampler(self) -> Sampler:
        split = self.dataset.manifest.splits[TRAIN]
        training, data = self.config.training, self.config.data
        total = total_rows(training, split.rows)
        return Sampler(
            split.rows, self.config.seed, training.global_batch, total, data.order, split.source_rows(data.weights)
        )

    def record(self) -> dict[str, Any]:
        """``run.json``: what the run is."""
        return {
            "name": self.config.run.name,
            "created": utc_now(),
            "config": self.config.model_dump(mode="json"),
            "base": self.base_identity.name,
            "base_files": self.base_identity.files,
            "init_from": self.init_from,
            "data": {
                "fingerprint": self.dataset.manifest.fingerprint,
                "weights": self.config.data.weights,
                "mixture_version": MIXTURE_VERSION,
                **self.dataset.manifest.identity,
            },
            "versions": versions(),
        }

    def spec(self, attempt: str, resume_from: CheckpointRef | None) -> WorkerSpec:
        trainer = self.config.trainer()
        trainer = trainer.model_copy(update={"model": at_commit(trainer.model, self.base)})
        return WorkerSpec(
            run_uri=self.run.storage.uri,
            attempt=attempt,
            resume_from=resume_from.name if resume_from else None,
            trainer=trainer,
            base_identity=self.base_identity.name,
            other_base=self.other_base,
            dataset_uri=self.dataset.location.uri,
            fingerprint=self.dataset.manifest.fingerprint,
            order=self.config.data.order,
            weights=self.config.data.weights,
            init_from=None if resume_from else self.init_from,
            collective_timeout_s=self.config.cluster.collective_timeout_s,
            resolved_config=self.config.model_dump(mode="json"),
        )


def find_init(init_from: str) -> str:
    """``<run folder>[@step]`` to the URI of a checkpoint. Raises BadInput where there is none."""
    named = _AT_STEP.fullmatch(init_from)
    folder, step = named.groups() if named else (init_from, None)
    run = RunDirectory.at(folder)
    found = [ref for ref in durable_checkpoints(run) if step is None or ref.step == int(step)]
    if not found:
        there = ", ".join(str(ref.step) for ref in durable_checkpoints(run)) or "none"
        raise BadInput(f"init_from={init_from!r}: no such checkpoint; committed steps there: {there}")
    return run.checkpoints.uri_of(found[-1].name)


def check_length(config: Config, hf_config: Any) -> None:
    """Raises BadInput for packs longer than the model's positions."""
    longest = max_positions(hf_config)
    if longest is not None and config.data.seq_len > longest:
        raise BadInput(
            f"data.seq_len={config.data.seq_len} is beyond what the model was made for (max_position_embeddings="
            f"{longest}); lower it, or raise the model's with model.config_overrides.max_position_embeddings"
        )


def prepare_data(config: Config, base: Path, say: Say) -> Prepared:
    """Raises DataError, with file and line where it can."""
    check_length(config, model_config(base, config.model))
    encoder, root = make_encoder(config, base), datasets_root(config)
    if not (config.data.spread or (config.data.spread is None and _has_ray_cluster(config))):
        return prepare(config.data, encoder, root, report=say)
    from cluster.ray_prepare import write_tasks_on_ray, write_tasks_where_they_can_be
    from cluster.ray_train import connected

    write = write_tasks_on_ray if config.data.spread else write_tasks_where_they_can_be
    with connected():
        return prepare(config.data, encoder, root, write=write, report=say)


def _has_ray_cluster(config: Config) -> bool:
    """Whether workers run on machines of a cluster, so that the driver's need not be made for work."""
    from cluster.ray_train import has_cluster

    return config.cluster.launcher == Launcher.RAY and has_cluster() and not under_torchrun()


def make_encoder(config: Config, base: Path) -> Encoder:
    tokenizer = load_tokenizer(base, trust_remote_code=config.model.trust_remote_code)
    return Encoder(tokenizer, config.data, stop_tokens(tokenizer, base))


def datasets_root(config: Config) -> Storage:
    """Where prepared datasets lie, by fingerprint."""
    prepared = config.data.prepared
    return Storage.at(prepared) if prepared else Storage.at(config.run.storage).child("datasets")


def make_job(config: Config, say: Say) -> Job:
    """Check the storage, find the base, prepare the data. Raises BadInput for whatever is wrong with them."""
    run = open_run_to_write(config)
    init_from = _init_from(config, run)
    base = locate_base(config.model)
    dataset = prepare_data(config, base, say)
    if config.evaluation.patience is not None and not dataset.manifest.has_rows(VALIDATION):
        raise BadInput(
            f"evaluation.patience={config.evaluation.patience}: the validation split has no rows, so there is "
            "nothing to evaluate; hold out more records (data.validation, data.validation_fraction, data.split)"
        )
    return Job(config, run, base, base_identity(config.model, base, base_notes(config)), dataset, init_from)


def _init_from(config: Config, run: RunDirectory) -> str | None:
    """As the run recorded it, else as it is now. Raises BadInput where there is no such checkpoint."""
    if config.init_from is None:
        return None
    recorded = read_json(run.storage, "run.json")
    if recorded and recorded["config"].get("init_from") == config.init_from and recorded.get("init_from"):
        return str(recorded["init_from"])
    return find_init(config.init_from)


@dataclass(frozen=True)
class Standing:
    """How a run stands when the command is given."""

    newest: CheckpointRef | None
    why_finished: str
    """empty: something is left to do"""
    allowed_changes: tuple[str, ...]


def settle(job: Job, say: Say, *, record: bool = True) -> Standing:
    """Record a new run, or compare with the recorded one.

    Args:
        record: False only compares.

    Raises BadInput listing the differences where the run may not be continued with this configuration.
    """
    recorded = read_json(job.run.storage, "run.json")
    now = job.record()
    if recorded is None:
        _check_base(job, None)
        if record:
            write_json(job.run.storage, "run.json", now)
        return Standing(None, why_finished="", allowed_changes=())
    found = differences(recorded | {"config": with_defaults(recorded["config"])}, now)
    if stopped_by := refused(found, job.config.resume.allow):
        listing = "\n".join(f"  {difference}" for difference in stopped_by)
        keys = ",".join(d.key for d in stopped_by if d.key != _BATCH_KEY)
        raise BadInput(
            f"the run {job.run.storage.uri} was started with something else that matters:\n{listing}\n"
            "Give the old values to continue it, a new name to start another (run.name=…), or, if you mean to change "
            f"it in the middle, resume.allow=[{keys}]"
        )
    for difference in found:
        say(f"changed on purpose (resume.allow): {difference}")
    newest = newest_usable(job.run, say)
    why = why_finished(newest, job) if newest is not None else ""
    if not why:
        _check_base(job, newest)
    if newest is not None and not why:
        _check_continuation(job, newest, recorded, say)
    if found and record:
        write_json(job.run.storage, "run.json", now)
    return Standing(newest, why, tuple(str(d) for d in found))


def why_finished(newest: CheckpointRef, job: Job) -> str:
    """Empty where something is left to do: one of the fast tier has yet to become a durable one, and the last
    evaluation may have been given up for a wish to stop."""
    progress, evaluation, num_steps = newest.manifest.progress, job.config.evaluation, job.sampler.num_steps
    lacks_evaluation = job.dataset.manifest.has_rows(VALIDATION) and is_missing(progress, evaluation, num_steps)
    if newest.manifest.fast or lacks_evaluation:
        return ""
    return ended_early(progress, evaluation, num_steps) or (ALL_STEPS_DONE if progress.step >= num_steps else "")


def with_defaults(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recorded configuration with the keys that this release has added, so that an upgrade orphans no run."""
    try:
        return Config.model_validate(recorded).model_dump(mode="json")
    except ValidationError:
        return recorded  # a key was removed since; the comparison will name it


def write_result(job: Job, lease: Lease, ref: CheckpointRef | None, status: str, reason: str) -> None:
    """``result.json``: how the run stands, for scripts."""
    progress = asdict(ref.manifest.progress if ref else Progress())
    result = {
        "status": status,
        "reason": reason,
        **progress,
        "num_steps": job.sampler.num_steps,
        "attempts": len(job.run.lineage()),
        "claim": lease.id,
        "checkpoint": ref.name if ref else None,
        "written": utc_now(),
    }
    write_json(job.run.storage, "result.json", result)


def tell_finished(job: Job, lease: Lease, standing: Standing, say: Say) -> None:
    """That the run has nothing left to do."""
    step = standing.newest.step if standing.newest else 0
    say(f"the run is finished at step {step}: {standing.why_finished}; nothing to do")
    write_result(job, lease, standing.newest, Action.FINISH.value, standing.why_finished)


def export_if_asked(job: Job, lease: Lease) -> None:
    """The export that ``export.at_end`` asks for, unless it is there already."""
    if not job.config.export.at_end:
        return
    ref = checkpoint_to_export(job.config, job.run)
    if missing_exports(job.config, ref):
        text = f"step {ref.step:,} to {export_folder(job.run, ref.step).uri}"
        write_doing(job.run, Doing(DoingKind.EXPORTING, time.time(), text, lease.id))
        export_run(job.config, job.base, step=ref.step)


def _check_base(job: Job, newest: CheckpointRef | None) -> None:
    """Raises BadInput where the checkpoint to begin with was trained from another base, as workers would."""
    ref = newest
    if ref is None and job.init_from is not None and job.config.training.method == Method.LORA:
        try:
            ref = read_manifest(*Storage.holding(job.init_from))
        except FileNotFoundError as error:
            raise BadInput(f"init_from: the checkpoint {job.init_from} is not there any more") from error
    if ref is not None and not job.other_base:
        refuse_other_base(job.base_identity.name, ref.name, ref.manifest.base)


def _check_continuation(job: Job, newest: CheckpointRef, recorded: dict[str, Any], say: Say) -> None:
    progress = newest.manifest.progress
    batch = job.config.training.global_batch
    if (was_batch := recorded["config"]["training"]["global_batch"]) != batch:
        raise BadInput(
            f"{_BATCH_KEY} can't change within a run (was {was_batch}, now {batch}): a step's rows are a function of "
            f"it. Start a new run with init_from={job.run.storage.uri}"
        )
    if progress.rows_consumed != progress.step * batch and progress.rows_consumed < job.sampler.total_rows:
        raise BadInput(
            f"the run ended at step {progress.step} with a short last batch ({progress.rows_consumed} rows are not "
            f"{progress.step} × {batch}), so it can't go on without skipping rows; start a new run with init_from="
            f"{job.run.storage.uri}"
        )
    was = recorded["config"]["training"]
    now = job.config.training
    if (was["steps"], was["epochs"]) != (now.steps, now.epochs):
        say(
            f"the run's length changed: it now ends at step {job.sampler.num_steps}. The "
            f"{job.config.optimizer.schedule.value} schedule follows the new length from step {progress.step} on, so "
            "the learning rate may jump there"
        )
