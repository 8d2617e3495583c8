"""`training.deterministic`: the same bits again, also across a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.storage import Storage
from tests.gpu.test_step import PACKS, rows, train
from tests.support.engines import ADAMW, make_engine
from tests.support.gpu import needs_device
from tests.support.tiny import DRAFT, save_now
from trainer import checkpoint
from trainer.config import Attention, Method, Precision
from trainer.engine import ZeroEngine
from trainer.step import StepResult, train_step

pytestmark = [needs_device, pytest.mark.usefixtures("deterministic")]

VARIANTS: list[dict[str, Any]] = [
    {"method": method, "attention": attention, "activation_checkpointing": True}
    for method in Method
    for attention in (Attention.PACKED, Attention.SDPA)
]


def engine_of(base: str, variant: dict[str, Any]) -> ZeroEngine:
    return make_engine(base, ADAMW, precision=Precision.BF16, **variant)


def bits(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    return {name: value.cpu().clone() for name, value in engine.local_slices()}


def step_two(engine: ZeroEngine) -> StepResult:
    return train_step(engine, PACKS, rows(2), step=2, seed=0, micro_batch_size=2, learning_rate=ADAMW.lr)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{v['method'].value}-{v['attention'].value}")
def test_two_runs_are_equal_to_the_bit(base: str, variant: dict[str, Any]) -> None:
    runs = []
    for _ in range(2):
        engine = engine_of(base, variant)
        results = train(engine, ADAMW)
        runs.append(([(r.loss, r.grad_norm) for r in results], bits(engine)))
    (first, weights), (second, again) = runs
    assert first == second
    assert weights.keys() == again.keys() and all(torch.equal(weights[name], again[name]) for name in weights)


@pytest.mark.parametrize("method", list(Method))
def test_a_loaded_checkpoint_goes_on_with_the_same_bits(base: str, method: Method, tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    engine = engine_of(base, {"method": method})
    train(engine, ADAMW, steps=2)
    ref = save_now(engine, storage, DRAFT)
    whole = step_two(engine)
    resumed = engine_of(base, {"method": method})
    fresh = bits(resumed)
    checkpoint.load(resumed, storage, ref)
    assert any(not torch.equal(fresh[name], value) for name, value in bits(resumed).items() if name in fresh)
    continued = step_two(resumed)
    assert (continued.loss, continued.grad_norm) == (whole.loss, whole.grad_norm)
    after, again = bits(engine), bits(resumed)
    assert all(torch.equal(after[name], again[name]) for name in after)
