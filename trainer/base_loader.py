"""The base model with its weights: each rank reads its own slices, or transformers' loader does it all.

transformers loads under ZeRO-3 by having rank 0 read whole tensors and broadcast them. Where the files name tensors as
the model does, that is not needed. Everything else (fused, renamed, quantised) is left to it, and the log says why.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.base_weights import (
    PLAIN,
    Shape,
    StoredTensor,
    check_complete,
    missing_parameters,
    pieces_of_rank,
    read_pieces,
    stored_tensors,
)
from trainer.errors import ModelError
from trainer.meta_partition import partition_meta_model
from trainer.run_directory import Say


def load_base(
    path: Path,
    hf_config: Any,
    dtype: torch.dtype,
    deepspeed_config: dict[str, Any] | None,
    *,
    trust_remote_code: bool,
    say: Say,
) -> torch.nn.Module:
    """The model of ``hf_config`` with the weights in ``path``, in evaluation mode.

    Args:
        deepspeed_config: None builds it whole, in this process; otherwise collective.
        say: told which loader was used, and why.

    Raises ModelError where a file is damaged or misses a parameter, a shape is another than the model's, or ranks see
    different files.
    """
    if deepspeed_config is None:
        return load_by_transformers(path, hf_config, dtype, None, trust_remote_code)
    reason = reason_in_config(path, hf_config, trust_remote_code)
    if reason is None:
        model = skeleton(hf_config, dtype)
        stored = stored_tensors(path)
        reason = reason_in_tensors(model, stored)
    _check_agreement(reason)
    if reason is not None:
        say(f"base: transformers' loader reads it (rank 0 reads all and broadcasts), because {reason}")
        return load_by_transformers(path, hf_config, dtype, deepspeed_config, trust_remote_code)
    model.config.name_or_path = str(path)
    _by_slices(model, stored, dtype, deepspeed_config, say)
    return model


def skeleton(hf_config: Any, dtype: torch.dtype | None = None) -> Any:
    """The module on the meta device: names, shapes and ties, without memory."""
    from transformers import AutoModelForCausalLM

    options = {} if dtype is None else {"dtype": dtype}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), **options)


def renames_tensors(model: Any) -> bool:
    """Whether this architecture's files name or cut tensors otherwise than its modules do."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def shapes_of(model: torch.nn.Module) -> dict[str, Shape]:
    """Of every parameter by name; tied ones once, under the first name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def reason_in_config(path: Path, hf_config: Any, trust_remote_code: bool) -> str | None:
    """Why the model can't be read by slices, as far as its folder says; None where nothing speaks against it."""
    if trust_remote_code and getattr(hf_config, "auto_map", None):
        return "its code comes with it"
    if any(getattr(each, "quantization_config", None) for each in (hf_config, hf_config.get_text_config())):
        return "its weights are quantised"
    for key in ("transformers_weights", "fusion_config"):
        if getattr(hf_config, key, None) is not None:
            return f"its config.json sets {key}"
    if (path / "adapter_config.json").is_file():
        return "an adapter lies beside its weights"
    return None


def reason_in_tensors(model: Any, stored: Mapping[str, StoredTensor]) -> str | None:
    """Why tensors can't be read by the names of the model's parameters; None where they can, or are just missing.

    Args:
        model: a skeleton.
    """
    if renames_tensors(model):
        return f"files of {type(model).__name__} name or cut tensors otherwise than the model does"
    shapes = shapes_of(model)
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if buffers := model.state_dict().keys() - names:
        return f"its files hold buffers too, such as {min(buffers)}"
    if tied := [name for name in names - shapes.keys() if name in stored]:
        return f"its files hold {min(tied)}, which is tied to another"
    missing, unknown = sorted(shapes.keys() - stored.keys()), sorted(stored.keys() - names)
    if missing and unknown:
        return f"its files name tensors otherwise ({unknown[0]}, and no {missing[0]})"
    if odd := [name for name in shapes if name in stored and stored[name].dtype not in PLAIN]:
        return f"{odd[0]} is not stored as plain floating-point numbers"
    return None


def _check_agreement(reason: str | None) -> None:
    """Raises ModelError where ranks would go different ways, and then wait for each other."""
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    for rank, other in enumerate(reasons):
        if other != reasons[0]:
            found = [each or "nothing odd" for each in (reasons[0], other)]
            raise ModelError(
                f"the base is not the same on all workers: rank 0 finds {found[0]}, rank {rank} finds {found[1]}. Copy "
                "it to all nodes alike, or to a path that they share"
            )


def _by_slices(
    model: Any, stored: Mapping[str, StoredTensor], dtype: torch.dtype, deepspeed_config: dict[str, Any], say: Say
) -> None:
    started = time.perf_counter()
    shapes = shapes_of(model)
    check_complete(shapes, stored)
    partition_meta_model(model, dtype, deepspeed_config)
    pieces = pieces_of_rank(shapes, stored, dist.get_rank(), dist.get_world_size())
    # Before deepspeed.initialize, which gathers the small parameters that stay whole and makes the fp32 masters.
    read_pieces(pieces, {name: parameter.ds_tensor for name, parameter in model.named_parameters()})
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # transformers' sign that there is a value: what is left are the buffers
    model.initialize_weights()
    model.eval()
    unused = sorted(stored.keys() - shapes.keys())
    say(
        f"base: each worker read its own slices of the weights, this one {sum(piece.nbytes for piece in pieces):,} "
        f"bytes in {time.perf_counter() - started:.1f} s"
        + (f"; {len(unused)} tensors are not the model's and were left out, first {unused[0]}" if unused else "")
    )


def load_by_transformers(
    path: Path, hf_config: Any, dtype: torch.dtype, deepspeed_config: dict[str, Any] | None, trust_remote_code: bool
) -> torch.nn.Module:
    """Rank 0 reads whole tensors and broadcasts them. Raises ModelError where parameters are missing."""
    from transformers import AutoModelForCausalLM

    with building_partitioned(deepspeed_config):
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            config=hf_config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    if missing := set(found["missing_keys"]) & shapes_of(model).keys():
        raise missing_parameters(list(missing))  # transformers only warns, and draws them at random
    return model


@contextmanager
def building_partitioned(deepspeed_config: dict[str, Any] | None) -> Iterator[None]:
    """Within, transformers builds models under ``zero.Init``; None changes nothing."""
    from transformers.integrations import HfDeepSpeedConfig

    # It looks for a live one (a weak reference), so this name keeps it.
    alive = HfDeepSpeedConfig(deepspeed_config) if deepspeed_config is not None else None
    try:
        yield
    finally:
        del alive
