"""The base model: from a directory, a hub id or a bare config; whole or with LoRA; built into ZeRO-3 slices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer import attention
from trainer.base_loader import building_partitioned, load_base
from trainer.config import Attention, LoraConfig, Method, ModelConfig, Precision, TrainerConfig
from trainer.errors import ModelError
from trainer.progress_log import say_on_first_rank
from trainer.run_directory import Say

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP32: torch.float32}


def locate_base(config: ModelConfig) -> Path:
    """The base as a local directory, downloaded if it is a hub id.

    Raises:
        ModelError: not found, gated, without safetensors, or without a config.
    """
    path = Path(config.base).expanduser()
    if path.is_dir():
        check_base_directory(path, needs_weights=not config.random_init)
        return path
    if path.is_absolute() or config.base.startswith((".", "~")) or config.base.count("/") != 1:
        raise ModelError(
            f"model.base={config.base!r}: no such directory. Give a directory that holds config.json and "
            "*.safetensors, or a hub id such as Qwen/Qwen2.5-7B."
        )
    return _download(config)


def _download(config: ModelConfig) -> Path:
    """One download a node: the hub's cache locks its files, so workers of a node wait for the first."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.jinja", "*.txt", "*.py" if config.trust_remote_code else "*.json"]
    patterns += [] if config.random_init else ["*.safetensors"]
    try:
        path = Path(huggingface_hub.snapshot_download(config.base, revision=config.revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise ModelError(
            f"model.base={config.base!r} is gated: accept its licence on its hub page with your account, then set "
            f"HF_TOKEN (for a Ray job through runtime_env env_vars, on Kubernetes as a secret). The hub said: {error}"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = (
            "the hub refused it (401/403: HF_TOKEN missing or without access)"
            if status in (401, 403)
            else "no such directory here, and the hub could not be asked"
        )
        raise ModelError(
            f"model.base={config.base!r}: {hint}. Check the name, the network, or give a local directory. ({error})"
        ) from error
    check_base_directory(path, needs_weights=not config.random_init)
    return path


def weight_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors"))


def check_base_directory(path: Path, *, needs_weights: bool) -> None:
    """Refuse a directory that we could not or must not load, saying why."""
    if not (path / "config.json").is_file():
        raise ModelError(f"model.base={str(path)!r} has no config.json; it is not a transformers model directory.")
    if not needs_weights:
        return
    if not weight_files(path):
        pickled = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        found = f"only pickled weights ({', '.join(pickled[:3])}), which can execute code" if pickled else "no weights"
        raise ModelError(
            f"model.base={str(path)!r} has {found}. Baton reads safetensors only: convert with "
            "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…), or set model.random_init=true."
        )


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
