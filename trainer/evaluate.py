"""Loss and token accuracy over a held-out split: exact per token, independent of the world size."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch

from trainer.batch import MicroBatch, collate
from trainer.batch_geometry import rank_micro_batches
from trainer.errors import NonFiniteStep, StepInvariantBroken
from trainer.process_group import anywhere
from trainer.step import PackSource


class Scorer(Protocol):
    """One model on this rank, for training or for evaluation alone."""

    rank: int
    world_size: int
    device: torch.device

    def evaluate_micro_batch(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of losses and number of tokens predicted right: fp64 [2] on ``device``. Collective."""
        ...


class EvaluationGivenUp(Exception):
    """On all ranks; nothing has changed."""


class EvaluationResult(NamedTuple):
    loss: float
    """mean over trained tokens, nats"""
    trained_tokens: int
    correct_tokens: int
    """trained tokens that were the model's first choice"""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def accuracy(self) -> float:
        return self.correct_tokens / max(1, self.trained_tokens)


_LOOK_EVERY = 8
"""Micro batches between looks whether the evaluation is still wanted."""


def evaluate(
    engine: Scorer,
    source: PackSource,
    micro_batch_size: int,
    unwanted: Callable[[], bool] | None = None,
    beat: Callable[[], object] = lambda: None,
) -> EvaluationResult:
    """Every row once, split over the ranks like a step's. Collective.

    Args:
        unwanted: asked now and then; where it says so on one rank, all raise EvaluationGivenUp.
        beat: called before each micro batch.
    """
    parts = rank_micro_batches(
        source.num_rows, rank=engine.rank, world_size=engine.world_size, micro_batch_size=micro_batch_size
    )
    # sum of losses, tokens predicted right, trained tokens
    total = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for index, (start, stop) in enumerate(parts):
        beat()
        if unwanted is not None and index % _LOOK_EVERY == 0 and anywhere(unwanted(), engine.device):
            raise EvaluationGivenUp
        batch = collate(source.packs(np.arange(start, stop)))
        total[:2] += engine.evaluate_micro_batch(batch)
        total[2] += batch.num_trained
    torch.distributed.all_reduce(total)
    loss_sum, correct, count = total.tolist()
    expected = source.num_trained(np.arange(source.num_rows))
    if int(count) != expected:
        raise StepInvariantBroken(f"evaluated {int(count)} trained tokens, the split has {expected}")
    if not math.isfinite(loss_sum):
        raise NonFiniteStep(f"the evaluation loss is {loss_sum}; the weights have diverged. Lower optimizer.lr")
    return EvaluationResult(loss_sum / max(1.0, count), int(count), int(correct))
