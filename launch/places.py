"""Where a configuration's run lives, and what is committed there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from data_shards.errors import BadInput
from data_shards.storage import Storage
from launch.config import Config
from trainer.base_identity import NOTES, base_identity
from trainer.checkpoint import CheckpointRef
from trainer.config import Method, ModelConfig, TrainingConfig
from trainer.export import depends_on_base
from trainer.progress_log import say
from trainer.retention import best_of
from trainer.run_directory import RunDirectory
from trainer.survey import durable_checkpoints


def at_commit(model: ModelConfig, base: Path) -> ModelConfig:
    """With a hub id, workers on other nodes download the very commit that was resolved here as ``base``."""
    return model if Path(model.base).is_dir() else model.model_copy(update={"revision": base.name})


def base_notes(config: Config) -> Storage:
    """Where identities of bases are noted, for all runs of a storage."""
    return Storage.at(config.run.storage).child(NOTES)


def open_run(config: Config) -> RunDirectory:
    return RunDirectory(Storage.at(config.run.storage).child(config.run.name))


def open_run_to_write(config: Config) -> RunDirectory:
    """Raises BadInput where the storage can't be written."""
    Storage.at(config.run.storage).check_writable()
    return open_run(config)


def newest_checkpoint(run: RunDirectory, step: int | None = None) -> CheckpointRef:
    """The newest usable checkpoint, or the one of ``step``. Raises BadInput where there is none."""
    usable = durable_checkpoints(run)
    chosen = [ref for ref in usable if step is None or ref.step == step]
    if not chosen:
        there = ", ".join(str(ref.step) for ref in usable) or "none"
        raise BadInput(
            f"{run.storage.uri}: no checkpoint of step {step if step is not None else 'any'}; there: {there}"
        )
    return chosen[-1]


def checkpoint_to_export(config: Config, run: RunDirectory, step: int | None = None) -> CheckpointRef:
    """That of ``step``; else, with ``export.best``, the one with the lowest evaluation loss at its own step; else the
    newest. Raises BadInput where there is none."""
    if step is not None or not config.export.best:
        return newest_checkpoint(run, step)
    kept = durable_checkpoints(run)
    best = best_of(kept)
    if not best:
        raise BadInput(
            f"export.best: {run.storage.uri} has no checkpoint that was evaluated at its own step; let "
            "evaluation.every_steps and checkpoint.every_steps meet, or export the newest (export.best=false)"
        )
    found = best[0].manifest.progress.eval_loss
    lowest = kept[-1].manifest.progress
    if lowest.best_eval_loss is not None and found is not None and lowest.best_eval_loss < found:
        say(
            f"export.best: the lowest evaluation loss, {lowest.best_eval_loss:.4f}, was that of step "
            f"{lowest.best_eval_step}, of which there is no checkpoint; step {best[0].step} has the lowest of those "
            f"that were kept, {found:.4f}"
        )
    return best[0]


@dataclass(frozen=True)
class RecordedSettings:
    """What a checkpoint's weights mean depends on these."""

    model: ModelConfig
    training: TrainingConfig
    seed: int


def recorded_settings(config: Config, ref: CheckpointRef) -> RecordedSettings:
    """As the checkpoint itself has them; only where the base lies, and how it is computed, come from the configuration
    at hand, which may have changed since. Raises BadInput where they can't be read."""
    recorded = ref.manifest.config
    try:
        model = ModelConfig.model_validate(recorded["model"])
        training, seed = TrainingConfig.model_validate(recorded["training"]), int(recorded["seed"])
    except (KeyError, ValidationError) as error:
        raise BadInput(
            f"checkpoint {ref.name} was committed by a release whose configuration this one can't read ({error}); "
            "export it with that release (evaluate takes what it gives as --model)"
        ) from error
    ours = {key: getattr(config.model, key) for key in ("base", "revision", "attention", "trust_remote_code")}
    return RecordedSettings(model.model_copy(update=ours), training, seed)


def check_trained_on(config: Config, was: RecordedSettings, base: Path, ref: CheckpointRef) -> None:
    """Raises BadInput where a checkpoint that is nothing without its base (an adapter, or all weights of a model that
    has more than those) was trained on another than ``base``, that of ``config``."""
    if was.training.method != Method.LORA and not depends_on_base(base, was.model):
        return
    if (now := base_identity(config.model, base, base_notes(config)).name) != ref.manifest.base:
        raise BadInput(
            f"checkpoint {ref.name} was trained on the base {ref.manifest.base}, and model.base="
            f"{config.model.base!r} is {now}; give the base that it was trained on"
        )
