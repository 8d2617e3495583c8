"""What of a run is exported is what its checkpoint says, whatever the configuration and the base at hand say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_shards.errors import BadInput
from launch.config import Config
from launch.export import export_run
from launch.places import base_notes, open_run
from tests.integration.test_export import gemma4_config, save_with_buffers
from tests.support.checkpoints import masters_of, random_values, trained_shapes, write_checkpoint
from tests.support.tiny import save_tiny_model
from trainer.base_identity import base_identity
from trainer.config import Method


def configuration(folder: Path, **training: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "run", "storage": str(folder / "runs")},
            "data": {"train": "none.jsonl"},
            "model": {"base": str(folder / "base"), "precision": "fp32"},
            "training": {"global_batch": 2, "steps": 1, **training},
        }
    )


def commit_run(config: Config) -> Config:
    """A run whose only checkpoint has random values of what it trains."""
    run, base = open_run(config), Path(config.model.base)
    start = run.start_attempt(None, None, ())
    lora = config.training.lora if config.training.method == Method.LORA else None
    manifest = replace(
        masters_of(trained_shapes(base, lora), 2),
        attempt=start.attempt,
        base=base_identity(config.model, base, base_notes(config)).name,
        config=config.model_dump(mode="json"),
    )
    write_checkpoint(run.checkpoints, manifest, random_values())
    return config


def export(config: Config) -> dict[str, Path]:
    done = export_run(config, Path(config.model.base))
    return {name: Path(place.uri) for name, place in done.items()}


def test_a_base_that_gives_buffers_must_be_that_of_the_run(tmp_path: Path) -> None:
    save_with_buffers(tmp_path / "base", gemma4_config())
    config = commit_run(configuration(tmp_path))
    assert export(config).keys() == {"model"}
    path = tmp_path / "base" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadInput, match="was trained on the base"):
        export(config)


def test_a_base_that_gives_nothing_may_lack_its_weights(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    config = commit_run(configuration(tmp_path))
    (tmp_path / "base" / "model.safetensors").unlink()
    assert export(config).keys() == {"model"}
