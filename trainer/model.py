"""The base model: from a directory, a hub id or a bare config; whole or with LoRA; built into ZeRO-3 slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer import attention
from trainer.base_loader import building_partitioned, load_base
from trainer.base_location import locate_base
from trainer.config import Attention, LoraConfig, Method, ModelConfig, Precision, TrainerConfig
from trainer.errors import ModelError
from trainer.progress_log import say_on_first_rank
from trainer.run_directory import Say

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP32: torch.float32}


def model_config(path: Path, config: ModelConfig) -> Any:
    """The transformers config of the base, with our overrides. A wrong override's name is refused, and so is a base
    that comes with code, unless it is trusted."""
    from transformers import AutoConfig

    try:
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except ValueError as error:
        said = str(error).split("\n")[0]
        advice = "If you have read that code and trust it: model.trust_remote_code=true"
        problem = f"{said} {advice}" if "trust_remote_code" in str(error) else said
        raise ModelError(f"model.base={str(path)!r}: its config.json can't be used: {problem}") from error
    for key, value in config.config_overrides.items():
        if not hasattr(hf_config, key):
            raise ModelError(f"model.config_overrides.{key}: {type(hf_config).__name__} has no such field")
        setattr(hf_config, key, value)
    attention.register()
    hf_config._attn_implementation = config.attention.value
    return hf_config


def max_positions(hf_config: Any) -> int | None:
    """The longest sequence that the model was made for, tokens; None where its config doesn't say."""
    return getattr(hf_config, "max_position_embeddings", None)


def _silent(_: str) -> None:
    pass


def build_model(
    path: Path, config: ModelConfig, deepspeed_config: dict[str, Any] | None, *, seed: int, say: Say = _silent
) -> Any:
    """The base model on this rank; under ``deepspeed_config`` partitioned while it is built, never whole in memory.

    Args:
        path: what ``locate_base`` gave.
        seed: of random weights; the same on all ranks.
        say: told how the weights were read.

    Raises ModelError where the files are not whole, or are not those of the model.
    """
    from transformers import AutoModelForCausalLM

    hf_config = model_config(path, config)
    dtype = DTYPES[config.precision]
    if deepspeed_config is None and config.attention == Attention.PACKED:
        hf_config._attn_implementation = Attention.SDPA.value  # to generate, with masks and a cache
    trusted = config.trust_remote_code
    if config.random_init:
        torch.manual_seed(seed)
        with building_partitioned(deepspeed_config):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype, trust_remote_code=trusted)
    else:
        model = load_base(path, hf_config, dtype, deepspeed_config, trust_remote_code=trusted, say=say)
    model.config.use_cache = False
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def add_lora(model: torch.nn.Module, config: LoraConfig, *, seed: int) -> torch.nn.Module:
    """Freeze the base and add adapters, drawn alike on every rank."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(model, peft_config(config))


def peft_config(config: LoraConfig) -> Any:
    from peft import LoraConfig as PeftLoraConfig

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    return PeftLoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
    )


def build_trained_model(
    path: Path,
    config: ModelConfig,
    method: Method,
    lora: LoraConfig,
    deepspeed_config: dict[str, Any] | None,
    *,
    seed: int,
    say: Say = _silent,
) -> torch.nn.Module:
    model = build_model(path, config, deepspeed_config, seed=seed, say=say)
    return add_lora(model, lora, seed=seed) if method == Method.LORA else model


def model_to_train(config: TrainerConfig, deepspeed_config: dict[str, Any]) -> torch.nn.Module:
    """What a worker builds, for training or evaluation."""
    return build_trained_model(
        locate_base(config.model),
        config.model,
        config.training.method,
        config.training.lora,
        deepspeed_config,
        seed=config.seed,
        say=say_on_first_rank,
    )
