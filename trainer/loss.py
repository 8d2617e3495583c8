"""The token-exact loss: a sum here, divided once by the trained tokens of the global batch."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F

from trainer.batch import MicroBatch


def token_loss_sum(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Sum of cross entropies (nats) over the trained tokens of one micro batch: fp32 scalar.

    With no trained token the head still runs, on zero rows, and the sum is a zero that can be differentiated: a rank
    that skipped a module the others run would hang ZeRO-3.
    """
    return _loss_sum(_trained_logits(model, batch), batch)


def token_scores(model: Any, batch: MicroBatch) -> torch.Tensor:
    """Sum of cross entropies (nats), and how many trained tokens are the model's first choice: fp64 [2]."""
    logits = _trained_logits(model, batch)
    return torch.stack([_loss_sum(logits, batch).double(), (logits.argmax(-1) == batch.targets).sum().double()])


def _trained_logits(model: Any, batch: MicroBatch) -> torch.Tensor:
    """[N, V]: only where the next token is trained."""
    return cast(torch.Tensor, model(**batch.model_inputs()).logits[0])


def _loss_sum(logits: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    return F.cross_entropy(logits.float(), batch.targets, reduction="sum")
