"""Checkpoints made without training: random values in the files that ranks would have written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from data_shards.storage import Storage
from tests.support.tiny import DRAFT
from trainer.checkpoint import CheckpointRef, commit, target_of, write_rank
from trainer.checkpoint_manifest import ParameterEntry
from trainer.config import LoraConfig
from trainer.model import add_lora
from trainer.slices import slice_bounds


def trained_shapes(base: Path, lora: LoraConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Of what training this base would train, by name; no weights are read or made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        model = model if lora is None else add_lora(model, lora, seed=0)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def write_checkpoint(
    checkpoints: Storage, shapes: Mapping[str, tuple[int, ...]], world_size: int, *, seed: int = 0
) -> CheckpointRef:
    """A committed checkpoint of masters alone. One rank's slices are in memory at a time."""
    parameters = tuple(ParameterEntry(name, shape) for name, shape in shapes.items())
    manifest = replace(DRAFT, world_size=world_size, parameters=parameters, optimizer={"state_keys": []})
    target = target_of(checkpoints, manifest)
    for rank in range(world_size):
        generator = torch.Generator().manual_seed(seed * world_size + rank)
        bounds = {entry.name: slice_bounds(entry.numel, rank, world_size) for entry in parameters}
        slices = {
            f"{name}/fp32": torch.empty(stop - start).uniform_(-0.1, 0.1, generator=generator)
            for name, (start, stop) in bounds.items()
            if stop > start
        }
        write_rank(target, rank, slices)
    return commit(target, manifest)
