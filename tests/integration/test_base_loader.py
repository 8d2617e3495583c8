"""The base's weights, read by slices or by transformers, are those that ``from_pretrained`` gives, to the bit."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.distributed import run_workers
from tests.support.tiny import save_tiny_model
from trainer.base_weights import StoredTensor, stored_tensors
from trainer.config import LoraConfig, Method, ModelConfig, Precision, ZeroConfig
from trainer.deepspeed_config import deepspeed_config
from trainer.errors import ModelError
from trainer.model import DTYPES, build_trained_model

Tensors = dict[str, torch.Tensor]
BY_SLICES, BY_TRANSFORMERS = "each worker read its own slices of the weights", "transformers' loader reads it"


class Loaded(NamedTuple):
    """What a rank had after loading."""

    parameters: Tensors
    buffers: Tensors
    said: list[str]
    bytes_read: int
    """by ``base_weights``; transformers reads in its own way"""
    gathered_early: list[str]
    """parameters that were whole before the engine was made"""


Case = tuple[str, Precision, Method]
"""A base and how it is loaded."""


def load_all(cases: list[Case]) -> list[Loaded]:
    return [load(*case) for case in cases]


def load(base: str, precision: Precision, method: Method) -> Loaded:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    zero = deepspeed_config(precision, 0.0, ZeroConfig(param_persistence_threshold=50))
    config = ModelConfig(base=base, precision=precision)
    read: list[int] = []
    said: list[str] = []
    preadv = os.preadv

    def counting(*arguments: Any) -> int:
        read.append(preadv(*arguments))
        return read[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counting)
        model = build_trained_model(Path(base), config, method, LoraConfig(rank=2), zero, seed=0, say=said.append)
    # Adapters are not partitioned yet. peft moves what they are put on one level down.
    names = {name: name.removeprefix("base_model.model.").replace(".base_layer", "") for name, _ in named(model)}
    partitioned = {names[name]: p for name, p in named(model) if hasattr(p, "ds_status")}
    early = [name for name, p in partitioned.items() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
    buffers = {name.removeprefix("base_model.model."): value.clone() for name, value in model.named_buffers()}
    return Loaded(gather(partitioned), buffers, said, sum(read), early)


def named(model: torch.nn.Module) -> list[tuple[str, Any]]:
    return list(model.named_parameters())


def gather(parameters: dict[str, Any]) -> Tensors:
    import deepspeed

    found = {}
    for name, parameter in parameters.items():
        with deepspeed.zero.GatheredParameters(parameter):
            found[name] = parameter.detach().clone()
    return found


def rewrite(base: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """The tensors of a one-file base, changed."""
    tensors = change(load_file(base / "model.safetensors"))
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


def in_dtype(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value.to(dtype) for name, value in tensors.items()}


def in_three_files(base: Path) -> Path:
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    parts = {f"model-{i + 1:05d}-of-00003.safetensors": list(tensors)[i::3] for i in range(3)}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, base / file, {"format": "pt"})
    weight_map = {name: file for file, names in parts.items() for name in names}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    other = {name: torch.zeros_like(value) for name, value in tensors.items()}
    save_file(other, base / "original.safetensors")  # which the index does not name, as some repositories have it
    return base


def save_model(path: Path, config: Any) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    return path


def gpt2(path: Path) -> Path:
    from transformers import GPT2Config

    return save_model(path, GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def gemma(path: Path) -> Path:
    from transformers import GemmaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    return save_model(path, GemmaConfig(vocab_size=97, num_key_value_heads=2, head_dim=8, **sizes))


def mixtral(path: Path) -> Path:
    """Its files hold experts one by one, its modules all together."""
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return save_model(path, MixtralConfig(vocab_size=97, num_key_value_heads=2, num_local_experts=4, **sizes))


def without_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("transformer."): value for name, value in tensors.items()}


def with_head(tensors: Tensors) -> Tensors:
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def with_old_buffer(tensors: Tensors) -> Tensors:
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By name; the first word says who must read it."""
    folder = tmp_path_factory.mktemp("bases")

    def tiny(family: str, name: str, **options: Any) -> Path:
        return save_tiny_model(folder / name, family, **options)

    made = {
        "slices: llama": tiny("llama", "llama"),
        "slices: llama in bf16, three files": in_three_files(rewrite(tiny("llama", "b"), in_dtype(torch.bfloat16))),
        "slices: mistral in fp16": rewrite(tiny("mistral", "c"), in_dtype(torch.float16)),
        "slices: qwen2, tied": tiny("qwen2", "d", tied=True),
        "slices: llama, an old buffer": rewrite(tiny("llama", "e"), with_old_buffer),
        "slices: gemma": gemma(folder / "f"),
        "slices: gpt2": gpt2(folder / "g"),
        "transformers: gpt2 without its prefix": rewrite(gpt2(folder / "h"), without_prefix),
        "transformers: mixtral": mixtral(folder / "i"),
        "transformers: qwen2, tied and twice there": rewrite(tiny("qwen2", "j", tied=True), with_head),
    }
    return {name: str(path) for name, path in made.items()}


def expected(base: str, precision: Precision) -> tuple[Tensors, Tensors]:
    """Parameters and buffers as plain transformers gives them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=DTYPES[precision])
    return dict(model.named_parameters()), dict(model.named_buffers())


def same(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


def cases_of(bases: dict[str, str]) -> list[Case]:
    """Each base in bf16; one of each of the files' dtypes in fp32 too; frozen under LoRA."""
    in_bf16 = [(name, Precision.BF16, Method.FULL) for name in bases]
    in_fp32 = [(name, Precision.FP32, Method.FULL) for name in list(bases)[:3]]
    return [*in_bf16, *in_fp32, ("slices: qwen2, tied", Precision.BF16, Method.LORA)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_are_those_of_from_pretrained(bases: dict[str, str], world_size: int) -> None:
    cases = cases_of(bases)
    by_rank = run_workers(load_all, world_size, [(bases[name], *how) for name, *how in cases])
    for (name, precision, method), *ranks in zip(cases, *by_rank, strict=True):
        parameters, buffers = expected(bases[name], precision)
        where = f"{name}, {precision}, {method}, W={world_size}"
        for rank in ranks:
            assert same(rank.parameters, parameters), where
            assert same(rank.buffers, buffers), where
            assert rank.gathered_early == [], where
        if name.startswith("transformers"):
            assert BY_TRANSFORMERS in ranks[0].said[0], where
            continue
        assert BY_SLICES in ranks[0].said[0], f"{where}: {ranks[0].said}"
        check_bytes(stored_tensors(Path(bases[name])), parameters, [rank.bytes_read for rank in ranks])


def load_own(bases: list[str]) -> str:
    """The error of loading another base on each rank."""
    with pytest.raises(ModelError) as raised:
        load(bases[torch.distributed.get_rank()], Precision.BF16, Method.FULL)
    return str(raised.value)


def test_ranks_that_see_different_files_say_so(bases: dict[str, str]) -> None:
    """Where each node has its own copy: one rank would broadcast, the other read, and both wait."""
    own = [bases["slices: qwen2, tied"], bases["transformers: qwen2, tied and twice there"]]
    for message in run_workers(load_own, 2, own, timeout_s=60):
        assert "rank 0 finds nothing odd, rank 1 finds its files hold lm_head.weight, which is tied" in message


def check_bytes(stored: dict[str, StoredTensor], parameters: Tensors, read: list[int]) -> None:
    """Every byte of the parameters is read once by some rank, and each rank reads its share."""
    sizes = [value.numel() * stored[name].dtype.itemsize for name, value in parameters.items()]
    assert sum(read) == sum(sizes)
    share = sum(sizes) / len(read)
    print(f"{sum(sizes):,} bytes of parameters; read by each rank: {read}")
    assert max(read) - share <= 4 * len(read) * len(sizes), "at most a rounded-up element of each parameter more"
