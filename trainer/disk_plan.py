"""Bytes that a run writes, and host memory that saving and reading them back takes, from shapes alone (pure)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from data_shards.hashed_file import DIGEST_BYTES
from trainer.config import CheckpointConfig
from trainer.model_shape import FP32, ModelShape, ParameterShape, count
from trainer.rank_file import RANK_BLOCK_BYTES
from trainer.slices import slice_bounds
from trainer.tensor_files import TensorSpec, header_bytes


def rank_file_bytes(
    trained: Sequence[ParameterShape], rank: int, world_size: int, state_keys: Sequence[str]
) -> int:  # fmt: skip
    """The exact size of ``rank-<r>.safetensors``, as ``trainer/checkpoint.py`` writes it: slices without padding."""
    return _file_bytes([p.name for p in trained], _lengths(trained, rank, world_size), state_keys)


def _lengths(trained: Sequence[ParameterShape], rank: int, world_size: int) -> tuple[int, ...]:
    bounds = (slice_bounds(parameter.numel, rank, world_size) for parameter in trained)
    return tuple(stop - start for start, stop in bounds)


def _file_bytes(names: Sequence[str], lengths: Sequence[int], state_keys: Sequence[str]) -> int:
    specs = {
        f"{name}/{part}": TensorSpec((length,), torch.float32)
        for name, length in zip(names, lengths, strict=True)
        if length
        for part in ("fp32", *state_keys)
    }
    return len(header_bytes(specs)) + sum(spec.nbytes for spec in specs.values())


def checkpoint_bytes(trained: Sequence[ParameterShape], world_size: int, state_keys: Sequence[str]) -> int:
    """All rank files and their hashes together; the manifest adds some kilobytes."""
    names = [parameter.name for parameter in trained]
    alike = Counter(_lengths(trained, rank, world_size) for rank in range(world_size))  # most ranks hold as much
    return sum(number * _with_hashes(_file_bytes(names, lengths, state_keys)) for lengths, number in alike.items())


def _with_hashes(size: int) -> int:
    return size + -(-size // RANK_BLOCK_BYTES) * DIGEST_BYTES


def retained_checkpoints(config: CheckpointConfig, steps: int | None) -> int:
    """Checkpoints on disk at the worst moment: a new one is written before an old one goes.

    Args:
        steps: of the whole run; None where it is not known, and then those that ``keep_every`` keeps are not counted.
    """
    for_good = (steps or 0) // math.lcm(config.every_steps, config.keep_every) if config.keep_every else 0
    return config.keep_last + 1 + config.keep_best + for_good


def fast_tier_bytes(
    config: CheckpointConfig, trained: Sequence[ParameterShape], world_size: int, state_keys: Sequence[str]
) -> int:
    """On its node's own disk, of rank 0, which writes the most: those to keep, and the one that is being written."""
    if config.fast is None:
        return 0
    return (config.fast.keep_last + 1) * _with_hashes(rank_file_bytes(trained, 0, world_size, state_keys))


def export_bytes(shape: ModelShape, dtype_bytes: int, *, merge_lora: bool) -> dict[str, int]:
    """Tensor bytes of each file set that ``trainer/export.py`` would write; headers add some kilobytes."""
    adapter = [p for p in shape.parameters if ".lora_" in p.name]
    if not adapter:
        return {"model": count(shape.parameters) * dtype_bytes}
    merged = {"merged": count(shape.base) * dtype_bytes} if merge_lora else {}
    return {"adapter": count(adapter) * FP32, **merged}


def staging_bytes(trained: Sequence[ParameterShape], world_size: int, state_keys: Sequence[str]) -> int:
    """Host memory that a worker keeps for the copies that saves write, and through which a checkpoint comes to a GPU
    (``trainer/staging.py``): of rank 0, which holds the most."""
    return sum(_lengths(trained, 0, world_size)) * FP32 * (1 + len(state_keys))
