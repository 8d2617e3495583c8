"""What is exported loads in plain transformers and peft, and computes what the trained engine computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data_shards.pack import Pack
from data_shards.storage import Storage
from tests.support.checkpoints import committed, masters_of, random_values, trained_shapes, write_checkpoint
from tests.support.distributed import run_workers
from tests.support.engines import ADAMW, make_engine
from tests.support.tiny import DRAFT, ragged_packs, save_now, save_tiny_model, tiny_config
from trainer.batch import collate
from trainer.config import LoraConfig, Method, ModelConfig, Precision
from trainer.export import (
    ExportSource,
    depends_on_base,
    export_adapter,
    export_full,
    export_merged,
    untrained_tensors,
)
from trainer.export_plan import ExportManifest
from trainer.step import train_step

IDS = torch.arange(2, 42)[None]
ALL = collate([Pack(IDS[0].numpy(), np.ones(IDS.numel(), bool), np.array([IDS.numel()]))])
LORA = LoraConfig(rank=4)


def train_and_save(base: str, root: str, method: Method) -> torch.Tensor:
    """A few steps, a checkpoint, and the engine's own logits: fp32 [1, T, V]."""
    engine = make_engine(base, ADAMW, method=method)
    for step in range(4):
        rows = np.arange(step * 3, step * 3 + 3)
        train_step(engine, ragged_packs(12), rows, step=step, seed=0, micro_batch_size=2, learning_rate=3e-3)
    save_now(engine, Storage.at(root), DRAFT)
    engine.module.eval()
    with torch.no_grad():
        # As the trainer calls it, but with all logits.
        return engine._engine(**ALL.model_inputs() | {"logits_to_keep": 0}).logits


def source_of(base: Path, root: Path) -> ExportSource:
    storage = Storage.at(root)
    model = ModelConfig(base=str(base), precision=Precision.FP32)
    return ExportSource(storage, committed(storage)[-1], base, model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
@pytest.mark.parametrize("tied", [False, True])
def test_full_export_equals_the_engine(tmp_path: Path, family: str, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    base = save_tiny_model(tmp_path / "base", family, tied=tied)
    expected = run_workers(train_and_save, 2, str(base), str(tmp_path / "checkpoints"), Method.FULL)[0]
    export_full(source_of(base, tmp_path / "checkpoints"), Storage.at(tmp_path / "out"), torch.float32)
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert tuned.dtype == torch.float32 and tuned.config.tie_word_embeddings == tied
    assert close(logits(tuned), expected)
    assert not close(logits(AutoModelForCausalLM.from_pretrained(base)), expected), "training must have moved it"


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_adapter_and_merged_model_agree(tmp_path: Path, family: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = save_tiny_model(tmp_path / "base", family, tied=family == "qwen2")
    expected = run_workers(train_and_save, 2, str(base), str(tmp_path / "checkpoints"), Method.LORA)[0]
    source = source_of(base, tmp_path / "checkpoints")
    assert sum(p.numel for p in source.ref.manifest.parameters) < 0.3 * sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters()
    ), "a LoRA checkpoint holds the adapter only"
    export_adapter(source, LORA, Storage.at(tmp_path / "adapter"))
    export_merged(source, LORA, Storage.at(tmp_path / "merged"), torch.float32)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    assert close(logits(adapted), expected)
    assert close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), expected)
    assert not close(logits(AutoModelForCausalLM.from_pretrained(base)), expected)


def gemma4_config() -> Any:
    from transformers import Gemma4TextConfig

    layers = ["sliding_attention", "full_attention"]
    heads = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "layer_types": layers}
    return tiny_config(kind=Gemma4TextConfig, **heads)


def dots1_config() -> Any:
    from transformers import Dots1Config

    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    groups = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    return tiny_config(kind=Dots1Config, head_dim=8, **experts, **groups)


def save_with_buffers(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """A base whose buffers are not what its architecture begins with; returns them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    buffers = untrained_tensors(model)
    for number, value in enumerate(buffers.values(), 1):
        value.copy_(torch.arange(value.numel()) + number / 8)
    model.save_pretrained(folder)
    return buffers


BUFFERED = pytest.mark.parametrize("make_config", [gemma4_config, dots1_config])


@BUFFERED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("named", ["as the model does", "otherwise"])
def test_buffers_are_those_of_the_base(
    tmp_path: Path, make_config: Callable[[], Any], dtype: torch.dtype, named: str
) -> None:
    """No checkpoint holds them. A bare model's files name everything without ``model.``, which transformers adds."""
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    buffers = save_with_buffers(base, make_config())
    if named == "otherwise":
        file = base / "model.safetensors"
        save_file({name.removeprefix("model."): value for name, value in load_file(file).items()}, file)
    write_checkpoint(Storage.at(tmp_path / "checkpoints"), masters_of(trained_shapes(base), 3), random_values())
    source = source_of(base, tmp_path / "checkpoints")
    assert depends_on_base(source.base, source.model)
    export_full(source, Storage.at(tmp_path / "out"), dtype)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(told.values()), told
    found = model.state_dict()
    assert buffers and all(torch.equal(found[name], value) for name, value in buffers.items())
    with source.reader() as reader:
        for name, value in model.named_parameters():
            expected = reader.read(name, "fp32", value.numel(), 0, value.numel()).to(dtype).float()
            assert torch.equal(value.flatten(), expected), name
    (manifest,) = tmp_path.glob("out/baton-export.json")
    assert "base" in ExportManifest.from_bytes(manifest.read_bytes(), "").request


@BUFFERED
def test_buffers_of_a_base_without_weights(tmp_path: Path, make_config: Callable[[], Any]) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config()
    config.save_pretrained(tmp_path / "base")
    shapes = trained_shapes(tmp_path / "base")
    write_checkpoint(Storage.at(tmp_path / "checkpoints"), masters_of(shapes, 2), random_values())
    source = source_of(tmp_path / "base", tmp_path / "checkpoints")
    random = replace(source, model=source.model.model_copy(update={"random_init": True}))
    export_full(random, Storage.at(tmp_path / "out"), torch.float32)
    expected = untrained_tensors(AutoModelForCausalLM.from_config(config))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert expected and all(torch.equal(found[name], value) for name, value in expected.items())


def test_files_that_name_tensors_otherwise_than_modules(tmp_path: Path) -> None:
    """Mixtral's experts are one tensor each in files, and one of all in memory."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = tiny_config("mistral").to_dict() | {"num_local_experts": 4, "num_experts_per_tok": 2}
    MixtralConfig(**{**config, "model_type": "mixtral", "architectures": None}).save_pretrained(tmp_path / "base")
    shapes = trained_shapes(tmp_path / "base")
    write_checkpoint(Storage.at(tmp_path / "checkpoints"), masters_of(shapes, 3), random_values())
    source = source_of(tmp_path / "base", tmp_path / "checkpoints")
    for _ in range(2):  # over an earlier one too
        export_full(source, Storage.at(tmp_path / "out"), torch.float32)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) - shapes.keys(), "these are the names of modules"
    parameters = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    assert parameters.keys() == shapes.keys()
    with source.reader() as reader:
        for name, value in parameters.items():
            assert torch.equal(reader.read(name, "fp32", value.numel(), 0, value.numel()), value.flatten())
