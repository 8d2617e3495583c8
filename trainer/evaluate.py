"""Loss over a held-out split: exact per token, independent of the world size."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

from trainer.batch import collate
from trainer.batch_geometry import rank_micro_batches
from trainer.engine import ZeroEngine
from trainer.errors import NonFiniteStep, StepInvariantBroken
from trainer.step import PackSource


class EvaluationResult(NamedTuple):
    loss: float
    """mean over trained tokens, nats"""
    trained_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def evaluate(engine: ZeroEngine, source: PackSource, micro_batch_size: int) -> EvaluationResult:
    """Every row once, split over the ranks like a step's. Collective."""
    parts = rank_micro_batches(
        source.num_rows, rank=engine.rank, world_size=engine.world_size, micro_batch_size=micro_batch_size
    )
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # sum of losses, trained tokens
    for start, stop in parts:
        batch = collate([source.pack(row) for row in range(start, stop)])
        total[0] += engine.evaluate_micro_batch(batch).double()
        total[1] += batch.num_trained
    torch.distributed.all_reduce(total)
    loss_sum, count = total.tolist()
    expected = source.num_trained(np.arange(source.num_rows))
    if int(count) != expected:
        raise StepInvariantBroken(f"evaluated {int(count)} trained tokens, the split has {expected}")
    if not math.isfinite(loss_sum):
        raise NonFiniteStep(f"the evaluation loss is {loss_sum}; the weights have diverged. Lower optimizer.lr")
    return EvaluationResult(loss_sum / max(1.0, count), int(count))
