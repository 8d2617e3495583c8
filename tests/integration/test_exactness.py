"""Promise 2: at any world size and micro batch, every step equals plain single-process PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.order.sampler import Sampler
from tests.support.distributed import run_workers
from tests.support.engines import ADAMW, SGD, full_weights, make_engine
from tests.support.plain_loop import PlainRun, plain_run
from tests.support.tiny import MemoryPacks, ragged_packs, save_tiny_model
from trainer.config import Method, OptimizerConfig, OptimizerName, Precision
from trainer.engine import ZeroEngine
from trainer.evaluate import evaluate
from trainer.loss import token_loss_sum
from trainer.schedule import learning_rate
from trainer.step import StepResult, train_step

Run = tuple[list[StepResult], dict[str, torch.Tensor]]
STEPS = 30
PACKS: MemoryPacks = ragged_packs(23, barren=(3, 4, 11, 12))
SAMPLER = Sampler(num_rows=23, seed=7, global_batch=5, total_rows=5 * STEPS - 3)


class NoWorldFactor(ZeroEngine):
    """Mutant: gradients are left as DeepSpeed's mean over ranks."""

    def train_micro_batch(self, batch: Any, global_trained_tokens: int, *, is_last: bool) -> torch.Tensor:
        return super().train_micro_batch(batch, global_trained_tokens * self.world_size, is_last=is_last)


class MeanOfMeans(ZeroEngine):
    """Mutant: each micro batch weighs the same, however many tokens it trains."""

    def train_micro_batch(self, batch: Any, global_trained_tokens: int, *, is_last: bool) -> torch.Tensor:
        parts = (5 + self.world_size - 1) // self.world_size
        local = max(1, batch.num_trained) * parts * self.world_size
        return super().train_micro_batch(batch, local, is_last=is_last)


class AccumulationScaled(ZeroEngine):
    """Mutant: DeepSpeed divides by its own number of accumulation steps."""

    def train_micro_batch(self, batch: Any, global_trained_tokens: int, *, is_last: bool) -> torch.Tensor:
        self._engine.gradient_accumulation_steps = lambda: (5 + self.world_size - 1) // self.world_size
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss_sum = token_loss_sum(self._engine, batch)
        self._engine.backward(loss_sum * (self.world_size / global_trained_tokens), scale_wrt_gas=True)
        return loss_sum.detach()


def train(engine: ZeroEngine, optimizer: OptimizerConfig, micro_batch: int, steps: int) -> list[StepResult]:
    return [
        train_step(
            engine,
            PACKS,
            SAMPLER.rows_of_step(step),
            step=step,
            seed=7,
            micro_batch_size=micro_batch,
            learning_rate=learning_rate(optimizer, step, STEPS),
        )
        for step in range(steps)
    ]


def run(base: str, optimizer: OptimizerConfig, micro_batch: int) -> Run:
    engine = make_engine(base, optimizer)
    return train(engine, optimizer, micro_batch, STEPS), full_weights(engine)


def run_all(base: str, cases: list[tuple[OptimizerConfig, int]]) -> list[Run]:
    return [run(base, optimizer, micro_batch) for optimizer, micro_batch in cases]


def run_variants(base: str, variants: list[dict[str, Any]]) -> list[list[StepResult]]:
    """Three SGD steps of each variant of model and method."""
    return [train(make_engine(base, SGD, **variant), SGD, micro_batch=2, steps=3) for variant in variants]


def run_random_init(base: str) -> tuple[float, float]:
    """(evaluation loss of the loaded base, loss of a first step from random weights)."""
    loaded = evaluate(make_engine(base, SGD), PACKS, 3)
    (first,) = train(make_engine(base, SGD, random_init=True), SGD, micro_batch=2, steps=1)
    return loaded.loss, first.loss


def run_mutant(base: str, kind: type[ZeroEngine]) -> list[StepResult]:
    return train(make_engine(base, SGD, kind), SGD, micro_batch=1, steps=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("base")))


def plain(base: str, optimizer: OptimizerConfig) -> PlainRun:
    def make(model: Any) -> torch.optim.Optimizer:
        if optimizer.name == OptimizerName.SGD:
            return torch.optim.SGD(model.parameters(), lr=optimizer.lr)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        return torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
        )

    batches = [[PACKS.pack(int(row)) for row in SAMPLER.rows_of_step(step)] for step in range(STEPS)]
    return plain_run(Path(base), batches, make, optimizer.max_grad_norm)


@pytest.fixture(scope="module")
def references(base: str) -> dict[OptimizerName, PlainRun]:
    return {optimizer.name: plain(base, optimizer) for optimizer in (ADAMW, SGD)}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_step_equals_plain_pytorch(base: str, references: dict[OptimizerName, PlainRun], world_size: int) -> None:
    cases = [(optimizer, micro_batch) for optimizer in (ADAMW, SGD) for micro_batch in (1, 4)]
    by_rank = run_workers(run_all, world_size, base, cases)
    for (optimizer, micro_batch), (results, weights) in zip(cases, by_rank[0], strict=True):
        reference = references[optimizer.name]
        loss_error = np.max(np.abs(np.array([r.loss for r in results]) / reference.losses - 1))
        norm_error = np.max(np.abs(np.array([r.grad_norm for r in results]) / reference.grad_norms - 1))
        weight_error = max(
            float((weights[name] - value).norm() / value.norm()) for name, value in reference.weights.items()
        )
        print(
            f"{optimizer.name} W={world_size} micro={micro_batch}: loss {loss_error:.1e} grad norm {norm_error:.1e} "
            f"weights {weight_error:.1e}"
        )
        assert len(results) == STEPS and results[-1].rows == 2
        assert loss_error <= 1e-5 and norm_error <= 1e-5 and weight_error <= 1e-4
    if optimizer.name == OptimizerName.ADAMW:
        assert min(reference.grad_norms) > optimizer.max_grad_norm, "clipping must be at work"


def test_some_rank_trains_on_nothing_in_some_micro_batch() -> None:
    """The dataset above really holds the hard case."""
    barren = {3, 4, 11, 12}
    alone = [row for step in range(STEPS) for row in SAMPLER.rows_of_step(step) if int(row) in barren]
    assert len(alone) >= STEPS // 2


@pytest.mark.parametrize("mutant", [NoWorldFactor, MeanOfMeans, AccumulationScaled])
def test_mutants_are_caught(base: str, references: dict[OptimizerName, PlainRun], mutant: type[ZeroEngine]) -> None:
    results = run_workers(run_mutant, 2, base, mutant)[0]
    error = np.max(np.abs(np.array([r.grad_norm for r in results]) / references[OptimizerName.SGD].grad_norms[:3] - 1))
    assert error > 1e-3, f"{mutant.__name__} went unnoticed (gradient norm off by {error:.1e})"


def test_what_must_not_change_the_figures(base: str, references: dict[OptimizerName, PlainRun]) -> None:
    """Activation checkpointing and the attention kernel change nothing; bf16 changes little; LoRA works with all."""
    reference = references[OptimizerName.SGD]
    recompute = {"activation_checkpointing": True}
    variants: list[dict[str, Any]] = [
        recompute,
        {"attention": "eager"},
        {"attention": "sdpa"},
        {"method": Method.LORA},
        {"method": Method.LORA, **recompute},
        {"precision": Precision.BF16},
    ]
    checkpointed, eager, sdpa, lora, lora_checkpointed, bf16 = run_workers(run_variants, 2, base, variants)[0]
    for results in (checkpointed, eager, sdpa):
        assert [r.loss for r in results] == pytest.approx(reference.losses[:3], rel=1e-5)
        assert [r.grad_norm for r in results] == pytest.approx(reference.grad_norms[:3], rel=1e-5)
    assert [r.grad_norm for r in lora_checkpointed] == pytest.approx([r.grad_norm for r in lora], rel=1e-5)
    assert lora[0].loss == pytest.approx(reference.losses[0], rel=1e-5), "an untrained adapter changes nothing"
    assert [r.loss for r in bf16] == pytest.approx(reference.losses[:3], rel=1e-2)
    assert [r.grad_norm for r in bf16] == pytest.approx(reference.grad_norms[:3], rel=5e-2)


def test_random_weights_and_evaluation_do_not_depend_on_the_number_of_workers(base: str) -> None:
    alone, *others = (run_workers(run_random_init, world_size, base)[0] for world_size in (1, 2, 3))
    for other in others:
        assert other == pytest.approx(alone, rel=1e-6)
    assert alone[1] == pytest.approx(np.log(97), rel=0.05), "random weights know nothing"
    assert abs(alone[0] - alone[1]) > 0.01, "the loaded base is another model than the random one"
