"""Where a configuration's run lives, and what is committed there."""

from __future__ import annotations

from pathlib import Path

from data_shards.errors import BadInput
from data_shards.storage import Storage
from launch.config import Config
from trainer.checkpoint import CheckpointRef
from trainer.config import ModelConfig
from trainer.run_directory import RunDirectory


def at_commit(model: ModelConfig, base: Path) -> ModelConfig:
    """With a hub id, workers on other nodes download the very commit that was resolved here as ``base``."""
    return model if Path(model.base).is_dir() else model.model_copy(update={"revision": base.name})


def open_run(config: Config) -> RunDirectory:
    return RunDirectory(Storage.at(config.run.storage).child(config.run.name))


def newest_checkpoint(run: RunDirectory, step: int | None = None) -> CheckpointRef:
    """The newest usable checkpoint, or the one of ``step``. Raises BadInput where there is none."""
    usable = run.usable_checkpoints()
    chosen = [ref for ref in usable if step is None or ref.step == step]
    if not chosen:
        there = ", ".join(str(ref.step) for ref in usable) or "none"
        raise BadInput(
            f"{run.storage.uri}: no checkpoint of step {step if step is not None else 'any'}; there: {there}"
        )
    return chosen[-1]
