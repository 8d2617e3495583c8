"""Checkpoints as released formats wrote them, kept in ``tests/golden/``; every later Baton must read them.

``python -m tests.support.golden FOLDER VERSION`` writes one, of a version that is still written. Never write over one
that is there.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from data_shards.storage import Storage
from tests.support.checkpoints import write_checkpoint
from tests.support.tiny import DRAFT
from trainer.checkpoint_manifest import CheckpointManifest, ParameterEntry, Progress

WORLD_SIZE = 3
PARAMETERS = (
    ParameterEntry("model.embed_tokens.weight", (11, 4)),
    ParameterEntry("model.layers.0.mlp.up_proj.weight", (5, 7)),
    ParameterEntry("model.norm.weight", (4,)),
    ParameterEntry("model.layers.0.tiny.bias", (1,)),  # some ranks hold nothing of it
)
STATE_KEYS = ("exp_avg", "exp_avg_sq")
PROGRESS = Progress(
    step=42,
    rows_consumed=252,
    tokens=25_200,
    trained_tokens=12_600,
    seconds={"data": 0.5, "forward_backward": 8.25},
    last_loss=1.25,
    eval_loss=1.5,
    first_eval_loss=3.75,
    eval_step=40,
)

LATER_PROGRESS = replace(
    PROGRESS,
    skipped_steps=3,
    skipped_in_a_row=1,
    best_eval_loss=1.25,
    best_eval_step=20,
    improved_eval_loss=1.375,
    evaluations_without_improvement=2,
)
"""with what version 5 added"""

FILES_AT = "/mnt/nvme/baton/golden-01234567"


def golden_values(parameter: ParameterEntry, part: str) -> torch.Tensor:
    """What the whole parameter's part holds: fp32 ``[numel]``."""
    index, key = PARAMETERS.index(parameter), ("fp32", *STATE_KEYS).index(part)
    return torch.arange(parameter.numel, dtype=torch.float32) * (index + 1) / 8 - key * 3


def golden_manifest() -> CheckpointManifest:
    """But for the files."""
    return replace(
        DRAFT,
        attempt="a0123456789b",
        created="2026-11-21T12:00:00Z",
        world_size=WORLD_SIZE,
        parameters=PARAMETERS,
        optimizer={"name": "adamw", "step": 42, "state_keys": list(STATE_KEYS)},
        progress=PROGRESS,
        fingerprint="0123456789abcdef0123456789abcdef",
        base="example/base@0123",
        config={"training": {"method": "full"}},
        versions={"python": "3.11.7", "torch": "2.13.0"},
    )


def write_golden(checkpoints: Storage, version: int) -> str:
    """Returns the checkpoint's name. One of the fast tier (4) has its files beside the manifest, where they are
    brought."""

    def values(parameter: ParameterEntry, part: str, start: int, stop: int) -> torch.Tensor:
        return golden_values(parameter, part)[start:stop]

    progress = LATER_PROGRESS if version == 5 else PROGRESS
    manifest = replace(golden_manifest(), progress=progress, files_at=FILES_AT if version == 4 else None)
    return write_checkpoint(checkpoints, manifest, values).name


if __name__ == "__main__":
    print(write_golden(Storage.at(Path(sys.argv[1]).resolve()), int(sys.argv[2])))
