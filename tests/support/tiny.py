"""Tiny models and packs, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.pack import Pack
from data_shards.storage import Storage
from trainer.checkpoint import CheckpointRef, directory_name, read_manifest
from trainer.checkpoint_manifest import CheckpointManifest, Progress
from trainer.engine import ZeroEngine
from trainer.saving import Saver

VOCAB = 97

DRAFT = CheckpointManifest(
    attempt="a1",
    created="2026-01-01T00:00:00Z",
    world_size=0,
    parameters=(),
    optimizer={"name": "adamw"},
    progress=Progress(),
    fingerprint="f",
    base="b",
    config={},
    versions={},
    files=(),
)
"""A checkpoint manifest to be completed by what saves it."""


def tiny_config(
    family: str = "llama", *, kind: Any = None, tied: bool = False, vocab_size: int = VOCAB, **overrides: Any
) -> Any:
    """A config of two layers and 32 features in the shape of a real family, or of a class of configs, ``kind``."""
    from transformers import LlamaConfig, MistralConfig, Qwen2Config

    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}
    values = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    return (kind or classes[family])(**(values | overrides))


def save_tiny_model(path: Path, family: str = "llama", *, seed: int = 0, **options: Any) -> Path:
    """Random weights, drawn wide enough that gradients are not tiny."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **options), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    model.save_pretrained(path)
    return path


class MemoryPacks:
    """A PackSource over packs in memory."""

    def __init__(self, packs: list[Pack]) -> None:
        self.all = packs
        self.num_rows = len(packs)
        self._trained = np.array([int(targets(pack).sum()) for pack in packs])

    def pack(self, row: int) -> Pack:
        return self.all[row]

    def packs(self, rows: np.ndarray) -> list[Pack]:
        return [self.all[row] for row in rows.tolist()]

    def num_trained(self, rows: np.ndarray) -> int:
        return int(self._trained[rows].sum())


def targets(pack: Pack) -> np.ndarray:
    """bool [T]: tokens that something is trained to predict: trained, and not first of their sequence."""
    first = np.zeros(len(pack.input_ids), bool)
    first[np.concatenate([[0], np.cumsum(pack.sequence_lengths)[:-1]])] = True
    return pack.trained.astype(bool) & ~first


def ragged_packs(num: int, *, seed: int = 0, longest: int = 24, barren: tuple[int, ...] = ()) -> MemoryPacks:
    """Packs of 1-4 sequences with very uneven numbers of trained tokens; rows in ``barren`` train on nothing."""
    rng = np.random.default_rng(seed)
    packs = []
    for row in range(num):
        lengths = rng.integers(2, longest, size=rng.integers(1, 5)).astype(np.int32)
        ids = rng.integers(2, VOCAB, size=lengths.sum()).astype(np.int32)
        trained = rng.random(ids.size) < rng.choice([0.05, 0.3, 0.95])
        trained[-1] = True
        packs.append(Pack(ids, trained & (row not in barren), lengths))
    return MemoryPacks(packs)


def save_now(engine: ZeroEngine, checkpoints: Storage, draft: CheckpointManifest = DRAFT) -> CheckpointRef:
    """A checkpoint of the engine as it is, on every rank."""
    saver = Saver(engine, checkpoints, commit_timeout_s=60)
    saver.begin(draft)
    ended = saver.finish()
    assert ended.error is None, ended.error
    return read_manifest(checkpoints, directory_name(draft.progress.step, draft.attempt))
