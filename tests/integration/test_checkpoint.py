"""Promises 4 and 5: saved at 2 workers, loaded at 1, 2, 3 and 4; bit-equal at the same size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.order.sampler import Sampler
from data_shards.storage import Storage
from tests.support.checkpoints import committed
from tests.support.distributed import run_workers
from tests.support.engines import ADAMW, full_weights, make_engine
from tests.support.plain_loop import plain_run
from tests.support.tiny import DRAFT, ragged_packs, save_now, save_tiny_model
from trainer import checkpoint
from trainer.checkpoint_manifest import Progress
from trainer.config import Method, Precision
from trainer.engine import ZeroEngine
from trainer.errors import CheckpointCorrupt
from trainer.step import StepResult, row_digest, train_step

Weights = dict[str, torch.Tensor]

STEPS, SAVED_AT = 30, 12
PACKS = ragged_packs(19, seed=3)
SAMPLER = Sampler(num_rows=19, seed=5, global_batch=6, total_rows=6 * STEPS)


def steps(engine: ZeroEngine, start: int, stop: int) -> list[StepResult]:
    return [
        train_step(
            engine, PACKS, SAMPLER.rows_of_step(step), step=step, seed=5, micro_batch_size=2, learning_rate=ADAMW.lr
        )
        for step in range(start, stop)
    ]


def whole_run(base: str, root: str, options: dict[str, Any]) -> tuple[list[StepResult], Weights]:
    """All steps; what is saved into ``root`` on the way must not disturb them."""
    engine = make_engine(base, ADAMW, **options)
    before = steps(engine, 0, SAVED_AT)
    draft = replace(DRAFT, progress=Progress(step=SAVED_AT, rows_consumed=SAVED_AT * 6))
    save_now(engine, Storage.at(root), draft)
    return before + steps(engine, SAVED_AT, STEPS), full_weights(engine)


def resumed_run(base: str, root: str, options: dict[str, Any]) -> tuple[list[StepResult], Weights]:
    """The steps behind the checkpoint in ``root``."""
    engine = make_engine(base, ADAMW, **options)
    checkpoint.load(engine, Storage.at(root), committed(Storage.at(root))[-1])
    return steps(engine, SAVED_AT, STEPS), full_weights(engine)


def undisturbed_run(base: str, options: dict[str, Any]) -> tuple[list[StepResult], Weights]:
    engine = make_engine(base, ADAMW, **options)
    return steps(engine, 0, STEPS), full_weights(engine)


def load_error(base: str, root: str) -> str:
    engine = make_engine(base, ADAMW)
    try:
        checkpoint.load(engine, Storage.at(root), committed(Storage.at(root))[-1])
    except CheckpointCorrupt as error:
        return f"{error.checkpoint}: {error.problem}"
    return ""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("base"), attention_dropout=0.2))


@pytest.fixture(scope="module")
def smooth_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("smooth")))


@pytest.fixture(scope="module")
def saved(smooth_base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[StepResult]]:
    """A checkpoint of SAVED_AT by 2 workers, and the results of the run that was left alone."""
    root = str(tmp_path_factory.mktemp("checkpoints"))
    return root, run_workers(whole_run, 2, smooth_base, root, {})[0][0]


@pytest.mark.parametrize(
    "options", [{}, {"method": Method.LORA}, {"precision": Precision.BF16}], ids=["full", "lora", "bf16"]
)
def test_same_size_is_bit_equal_even_with_dropout(base: str, tmp_path: Path, options: dict[str, Any]) -> None:
    whole, weights = run_workers(whole_run, 2, base, str(tmp_path), options)[0]
    resumed, again = run_workers(resumed_run, 2, base, str(tmp_path), options)[0]
    assert [r.loss for r in resumed] == [r.loss for r in whole[SAVED_AT:]]
    assert [r.grad_norm for r in resumed] == [r.grad_norm for r in whole[SAVED_AT:]]
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_saving_disturbs_nothing(smooth_base: str, saved: tuple[str, list[StepResult]]) -> None:
    left_alone = run_workers(undisturbed_run, 2, smooth_base, {})[0][0]
    assert [r.loss for r in saved[1]] == [r.loss for r in left_alone]
    assert [r.grad_norm for r in saved[1]] == [r.grad_norm for r in left_alone]


def plain_drift(base: str) -> np.ndarray:
    """How far plain PyTorch itself drifts when its micro batch is split differently: relative, per step."""

    def make(model: Any) -> torch.optim.Optimizer:
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=ADAMW.lr, betas=ADAMW.betas)

    batches = [[PACKS.pack(int(row)) for row in SAMPLER.rows_of_step(step)] for step in range(STEPS)]
    losses = [
        np.array(plain_run(Path(base), batches, make, ADAMW.max_grad_norm, micro_batch=size).losses)
        for size in (1, 2, 3, 6)
    ]
    return np.max([np.abs(other / losses[0] - 1) for other in losses[1:]], axis=0)


def test_another_size_goes_on_with_the_same_rows(smooth_base: str, saved: tuple[str, list[StepResult]]) -> None:
    root, whole = saved
    allowed = 3 * plain_drift(smooth_base).max()
    expected = np.array([r.loss for r in whole[SAVED_AT:]])
    for world_size in (1, 3, 4):
        resumed = run_workers(resumed_run, world_size, smooth_base, root, {})[0][0]
        for step, result in enumerate(resumed, SAVED_AT):
            rows = SAMPLER.rows_of_step(step)
            assert result.rows_digest == sum(row_digest(int(row)) for row in rows) == whole[step].rows_digest
        drift = np.abs(np.array([r.loss for r in resumed]) / expected - 1)
        print(f"2 -> {world_size} workers: drift {drift.max():.1e} (allowed {allowed:.1e}), final {drift[-1]:.1e}")
        assert drift.max() <= allowed
        assert drift[-1] <= 1e-5


def test_flipped_bit_is_named(smooth_base: str, saved: tuple[str, list[StepResult]]) -> None:
    root = saved[0]
    victim = next(Path(root).glob("*/rank-00001.safetensors"))
    original = victim.read_bytes()
    damaged = bytearray(original)
    damaged[len(damaged) // 2] ^= 4
    victim.write_bytes(damaged)
    try:
        message = run_workers(load_error, 1, smooth_base, root)[0]
    finally:
        victim.write_bytes(original)
    assert "rank-00001.safetensors" in message and "does not match its hash" in message
    assert run_workers(load_error, 1, smooth_base, root)[0] == ""


def test_no_manifest_no_checkpoint(saved: tuple[str, list[StepResult]]) -> None:
    storage = Storage.at(saved[0])
    name = storage.list()[0]
    manifest = Path(saved[0], name, "manifest.json")
    original = manifest.read_bytes()
    bad: list[str] = []
    for damaged in (original[: len(original) // 2], original.replace(b'"step": %d' % SAVED_AT, b'"step": 99'), b""):
        manifest.write_bytes(damaged)
        assert committed(storage, on_bad=lambda _name, problem: bad.append(problem)) == []
    manifest.unlink()
    assert committed(storage) == []
    manifest.write_bytes(original)
    assert len(bad) == 3 and [ref.step for ref in committed(storage)] == [SAVED_AT]
