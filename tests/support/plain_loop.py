"""The yardstick: fine-tuning in plain single-process PyTorch, one sequence at a time, without any of our code.

No packing, no DeepSpeed, no batches: what promise 2 and 3 say the trainer must equal.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from data_shards.pack import Pack


class PlainRun(NamedTuple):
    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, torch.Tensor]


def sequences(pack: Pack) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids [1, T], labels [T - 1] with -100 where untrained) of each sequence on its own."""
    found, start = [], 0
    for length in pack.sequence_lengths:
        ids = torch.from_numpy(pack.input_ids[start : start + length].astype(np.int64))
        trained = torch.from_numpy(pack.trained[start : start + length].astype(bool))
        found.append((ids[None], torch.where(trained, ids, -100)[1:]))
        start += int(length)
    return found


def pack_loss_sum(model: Any, pack: Pack) -> torch.Tensor:
    total = torch.zeros(())
    for ids, labels in sequences(pack):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits.float(), labels, reduction="sum", ignore_index=-100)
    return total


def trained_tokens(packs: list[Pack]) -> int:
    return sum(int((labels != -100).sum()) for pack in packs for _, labels in sequences(pack))


def plain_run(
    base: Path,
    batches: list[list[Pack]],
    make_optimizer: Any,
    max_grad_norm: float,
    *,
    micro_batch: int = 1,
    model: Any = None,
) -> PlainRun:
    """``micro_batch`` packs share one backward, which changes only the order of float additions."""
    from transformers import AutoModelForCausalLM

    model = model or AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.train()
    optimizer = make_optimizer(model)
    losses, norms = [], []
    for packs in batches:
        count, total = trained_tokens(packs), 0.0
        for start in range(0, len(packs), micro_batch):
            loss = sum(pack_loss_sum(model, pack) for pack in packs[start : start + micro_batch])
            (loss / count).backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(
            [p for p in model.parameters() if p.requires_grad], max_grad_norm or float("inf")
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
        norms.append(norm.item())
    return PlainRun(losses, norms, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})
