"""The token-exact loss: a sum here, divided once by the trained tokens of the global batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from trainer.batch import MicroBatch


def token_loss_sum(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Sum of cross entropies (nats) over the trained tokens of one micro batch: fp32 scalar.

    With no trained token the head still runs, on zero rows, and the sum is a zero that can be differentiated: a rank
    that skipped a module the others run would hang ZeRO-3.
    """
    logits = model(**batch.model_inputs()).logits[0]  # [N, V]
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")


def token_scores(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Sum of cross entropies (nats), and how many trained tokens are the model's first choice: fp64 [2]."""
    logits = model(**batch.model_inputs()).logits[0]  # [N, V]
    loss_sum = F.cross_entropy(logits.float(), batch.targets, reduction="sum")
    return torch.stack([loss_sum.double(), (logits.argmax(-1) == batch.targets).sum().double()])
