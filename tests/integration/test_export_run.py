"""What of a run is exported is what its checkpoint says, whatever the configuration and the base at hand say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.errors import BadInput
from data_shards.storage import Storage
from launch.config import Config, ExportSection, RunSection
from launch.evaluation_subject import checkpoint_subject
from launch.export import export_run, find_export, missing_exports
from launch.generate import load_tuned
from launch.places import base_notes, open_run
from tests.integration.test_export import gemma4_config, save_with_buffers
from tests.support.checkpoints import committed, masters_of, random_values, trained_shapes, write_checkpoint
from tests.support.tiny import save_tiny_model
from trainer.base_identity import base_identity
from trainer.config import Method, Precision
from trainer.export import ExportSource, export_full


def configuration(folder: Path, **training: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "run", "storage": str(folder / "runs")},
            "data": {"train": "none.jsonl"},
            "model": {"base": str(folder / "base"), "precision": "fp32"},
            "training": {"global_batch": 2, "steps": 1, **training},
        }
    )


def commit_run(config: Config, recorded: dict[str, Any] | None = None) -> Config:
    """A run whose only checkpoint has random values of what it trains.

    Args:
        recorded: as its configuration, instead of its own.
    """
    run, base = open_run(config), Path(config.model.base)
    start = run.start_attempt(None, None, ())
    lora = config.training.lora if config.training.method == Method.LORA else None
    manifest = replace(
        masters_of(trained_shapes(base, lora), 2),
        attempt=start.attempt,
        base=base_identity(config.model, base, base_notes(config)).name,
        config=recorded or config.model_dump(mode="json"),
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
    with pytest.raises(BadInput, match="was trained on the base"):
        checkpoint_subject(config, tmp_path / "base", None)  # as evaluate does


def test_a_base_that_gives_nothing_may_lack_its_weights(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    config = commit_run(configuration(tmp_path))
    (tmp_path / "base" / "model.safetensors").unlink()
    assert export(config).keys() == {"model"}


@pytest.fixture
def lora_run(tmp_path: Path) -> Config:
    save_tiny_model(tmp_path / "base")
    return commit_run(configuration(tmp_path, method="lora", lora={"rank": 4, "alpha": 64}))


@pytest.mark.parametrize("changed", [{"method": "lora", "lora": {"rank": 4, "alpha": 8}}, {"method": "full"}])
def test_method_and_alpha_are_those_of_the_checkpoint(
    tmp_path: Path, lora_run: Config, changed: dict[str, Any]
) -> None:
    merge = {"export": ExportSection(merge_lora=True)}
    expected = export(lora_run.model_copy(update=merge))
    assert expected.keys() == {"adapter", "merged"}
    assert json.loads((expected["adapter"] / "adapter_config.json").read_text())["lora_alpha"] == 64
    before = {path: path.read_bytes() for folder in expected.values() for path in folder.iterdir()}
    now = configuration(tmp_path, **changed).model_copy(update=merge)
    (ref,) = committed(open_run(now).checkpoints)
    assert missing_exports(now, ref) == []
    assert (found := find_export(now, ref)) is not None and Path(found.uri) == expected["adapter"]
    adapter = load_tuned(now, tmp_path / "base").peft_config["default"]
    assert (adapter.r, adapter.lora_alpha) == (4, 64), "generate takes it for what it is"
    for folder in expected.values():
        shutil.rmtree(folder)
    assert find_export(now, ref) is None and export(now) == expected
    assert {path: path.read_bytes() for folder in expected.values() for path in folder.iterdir()} == before


def test_changes_to_the_config_and_precision_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    config = configuration(tmp_path)
    overrides = {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}
    commit_run(config.model_copy(update={"model": config.model.model_copy(update={"config_overrides": overrides})}))
    assert config.model.precision == Precision.FP32
    bf16 = config.model.model_copy(update={"precision": Precision.BF16})
    written = json.loads((export(config.model_copy(update={"model": bf16}))["model"] / "config.json").read_text())
    assert written["rope_parameters"]["rope_theta"] == 777.0 and written["dtype"] == "float32"


def test_a_configuration_that_cannot_be_read_is_no_guess(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "base")
    config = configuration(tmp_path)
    with pytest.raises(BadInput, match="whose configuration this one can't read"):
        export(commit_run(config, recorded={"training": {"method": "full"}}))


def test_an_adapter_is_not_all_weights_of_a_model(tmp_path: Path, lora_run: Config) -> None:
    """Nor are those of another size."""
    checkpoints, base = open_run(lora_run).checkpoints, tmp_path / "base"
    adapter = ExportSource(checkpoints, committed(checkpoints)[0], base, lora_run.model)
    with pytest.raises(BadInput, match=r"holds other parameters than a LlamaForCausalLM.*lora_A"):
        export_full(adapter, Storage.at(tmp_path / "out"), torch.float32)
    full = commit_run(
        configuration(tmp_path).model_copy(update={"run": RunSection(name="full", storage=str(tmp_path))})
    )
    save_tiny_model(base, intermediate_size=64)
    with pytest.raises(BadInput, match=r"holds other parameters .*\(56, 32\)"):
        export(full)
    assert not (tmp_path / "out").exists()
