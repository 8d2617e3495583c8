"""What is exported loads in plain transformers and peft, and computes what the trained engine computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.pack import Pack
from data_shards.storage import Storage
from tests.support.checkpoints import committed, masters_of, random_values, trained_shapes, write_checkpoint
from tests.support.distributed import run_workers
from tests.support.engines import ADAMW, make_engine
from tests.support.tiny import DRAFT, ragged_packs, save_now, save_tiny_model, tiny_config
from trainer.batch import collate
from trainer.config import LoraConfig, Method, ModelConfig, Precision
from trainer.export import ExportSource, export_adapter, export_full, export_merged
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
