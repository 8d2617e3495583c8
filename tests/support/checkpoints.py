"""Checkpoints made without an engine: given values in the files that ranks would have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from data_shards.errors import CorruptFile
from data_shards.storage import Storage
from tests.support.tiny import DRAFT
from trainer.checkpoint import CheckpointRef, commit, read_manifest, target_of, write_rank
from trainer.checkpoint_manifest import CheckpointManifest, ParameterEntry
from trainer.config import LoraConfig
from trainer.model import add_lora
from trainer.slices import slice_bounds

Values = Callable[[ParameterEntry, str, int, int], torch.Tensor]
"""The elements of a part (``fp32``, ``exp_avg``, …) of a flattened parameter from a start to a stop: fp32
``[stop - start]``. Asked for in the order in which they are written."""


def trained_shapes(base: Path, lora: LoraConfig | None = None) -> dict[str, tuple[int, ...]]:
    """Of what training this base would train, by name; no weights are read or made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        model = model if lora is None else add_lora(model, lora, seed=0)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}


def masters_of(shapes: Mapping[str, tuple[int, ...]], world_size: int) -> CheckpointManifest:
    """What a checkpoint of these parameters says that holds no state of an optimizer; but for its files."""
    parameters = tuple(ParameterEntry(name, shape) for name, shape in shapes.items())
    return replace(DRAFT, world_size=world_size, parameters=parameters, optimizer={"state_keys": []})


def random_values(seed: int = 0) -> Values:
    generator = torch.Generator().manual_seed(seed)
    return lambda entry, part, start, stop: torch.empty(stop - start).uniform_(-0.1, 0.1, generator=generator)


def write_checkpoint(checkpoints: Storage, manifest: CheckpointManifest, values: Values) -> CheckpointRef:
    """Commit what ``manifest``, which lacks only its files, tells of. One rank's slices are in memory at a time."""
    target = target_of(checkpoints, manifest)
    for rank in range(manifest.world_size):
        bounds = [(entry, *slice_bounds(entry.numel, rank, manifest.world_size)) for entry in manifest.parameters]
        slices = {
            f"{entry.name}/{part}": values(entry, part, start, stop)
            for entry, start, stop in bounds
            if start < stop
            for part in ("fp32", *manifest.optimizer["state_keys"])
        }
        write_rank(target, rank, slices)
    return commit(target, manifest)


def committed(
    checkpoints: Storage, *, on_bad: Callable[[str, str], None] = lambda name, problem: None
) -> list[CheckpointRef]:
    """Committed checkpoints whose files have the right sizes, oldest first.

    Args:
        on_bad: called with name and problem for each directory that has a manifest which can't be accepted.
    """
    found = []
    for name in checkpoints.list():
        try:
            found.append(read_manifest(checkpoints, name))
        except FileNotFoundError:
            continue
        except CorruptFile as error:
            on_bad(name, str(error))
    return sorted(found, key=lambda ref: (ref.step, ref.name))
