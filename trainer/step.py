"""One optimizer step, exact over the global batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import xxhash

from data_shards.pack import Pack
from trainer.batch import collate
from trainer.batch_geometry import rank_micro_batches
from trainer.engine import ZeroEngine
from trainer.errors import StepInvariantBroken
from trainer.pulse import Phase
from trainer.step_clock import StepClock


class PackSource(Protocol):
    """A prepared split: random access to packs, and their sizes without reading them."""

    num_rows: int

    def packs(self, rows: np.ndarray) -> list[Pack]:
        """The packs with these row ids, int64 ``[n]``."""
        ...

    def num_trained(self, rows: np.ndarray) -> int:
        """Trained tokens in these rows together."""
        ...


class Standing(NamedTuple):
    """What a rank tells the others with each step, so that all of them act on it alike."""

    stop_requested: bool = False
    saving: bool = False
    """a save is still being written here"""
    save_failed: bool = False
    """the last save's part of this rank, or its commit"""
    save_stuck: bool = False
    """a save is still being written here that should long have ended"""
    out_of_room: bool = False
    """``save_failed``, because the disk is full"""
    room_short: bool = False
    """the next save needs more room than there is"""
    room_exhausted: bool = False
    """and nothing more may be removed"""


QUIET = Standing()


class StepResult(NamedTuple):
    """What all ranks agree happened in one step."""

    loss: float
    """mean over the trained tokens of the global batch, nats"""
    grad_norm: float
    """before clipping"""
    rows: int
    tokens: int
    trained_tokens: int
    rows_digest: int
    """sum of a hash of each row id that any rank really trained on: order-free, equal for equal batches"""
    standing: Standing
    """what is so on any rank"""
    seconds_by_part: Mapping[str, float]
    """this rank's wall seconds: data, forward_backward, checkpoint (until a save has copied what is going to change),
    optimizer, agreement (the all-reduce of these very figures)"""
    applied: bool = True
    """False: loss or gradients were inf or NaN, so all ranks left the update out"""
    nonfinite_rows: Mapping[int, Sequence[int]] = {}
    """by rank: those of its micro batches whose own loss was inf or NaN"""


def reseed(seed: int, step: int, rows: np.ndarray) -> None:
    """Make dropout a function of (seed, step, row ids), so that RNG state needs no saving."""
    digest = xxhash.xxh3_64(rows.astype("<i8").tobytes(), seed=(seed * 1_000_003 + step) & (2**64 - 1))
    torch.manual_seed(digest.intdigest() & (2**63 - 1))


def row_digest(row: int) -> int:
    return xxhash.xxh32(int(row).to_bytes(8, "little")).intdigest()


def train_step(
    engine: ZeroEngine,
    source: PackSource,
    rows: np.ndarray,
    *,
    step: int,
    seed: int,
    micro_batch_size: int,
    learning_rate: float,
    standing: Standing = QUIET,
    enter: Callable[[Phase], object] = lambda phase: None,
) -> StepResult:
    """Train on ``rows`` (int64 [B], the global batch; every rank passes the same) and update once.

    Args:
        step: completed steps before this one.
        standing: this rank's; what is so on any rank is so in the result.
        enter: told what begins.

    Raises:
        StepInvariantBroken: the ranks together did not train on just these rows and tokens.
    """
    global_trained = source.num_trained(rows)
    parts = rank_micro_batches(
        len(rows), rank=engine.rank, world_size=engine.world_size, micro_batch_size=micro_batch_size
    )
    clock = StepClock(engine.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    losses: list[torch.Tensor] = []  # of micro batches, on the device
    seen = np.zeros(4)  # rows, tokens, trained tokens, digest
    for index, (start, stop) in enumerate(parts):
        row_ids = rows[start:stop]
        enter(Phase.DATA)
        batch = collate(source.packs(row_ids))
        clock.mark("data")
        enter(Phase.FORWARD_BACKWARD)
        reseed(seed, step, row_ids)
        losses.append(engine.train_micro_batch(batch, max(1, global_trained), is_last=index == len(parts) - 1))
        loss_sum += losses[-1].double()
        if len(row_ids):
            seen += [len(row_ids), batch.input_ids.numel(), batch.num_trained, sum(map(row_digest, row_ids))]
        clock.mark("forward_backward")
    enter(Phase.CHECKPOINT)
    engine.await_readers()
    clock.mark("checkpoint")
    enter(Phase.UPDATE)
    grad_norm = engine.apply_step(learning_rate, loss_sum)
    clock.mark("optimizer")
    enter(Phase.AGREEMENT)
    # Counts and 32-bit digests are exact in float64, so one small all-reduce carries everything.
    agreed = torch.cat([loss_sum[None], torch.tensor([*seen, *standing], dtype=torch.float64, device=engine.device)])
    torch.distributed.all_reduce(agreed)
    clock.mark("agreement")
    total, num_rows, tokens, trained, digest, *somewhere = agreed.tolist()
    planned = (len(rows), global_trained, sum(map(row_digest, rows)))
    if (int(num_rows), int(trained), int(digest)) != planned:
        raise StepInvariantBroken(
            f"step {step}: the ranks trained on (rows, trained tokens, digest of row ids) "
            f"{(int(num_rows), int(trained), int(digest))}, the plan has {planned}; the dataset's index and its "
            "shards disagree, or the ranks run different plans"
        )
    loss = total / max(1, global_trained)
    seconds = clock.seconds()  # after tolist, which waits for the device
    all_standing = Standing(*(count > 0 for count in somewhere))
    counts = (int(num_rows), int(tokens), int(trained), int(digest))
    if grad_norm is None:
        culprits = _nonfinite_rows(rows, parts, losses)
        return StepResult(loss, math.inf, *counts, all_standing, seconds, applied=False, nonfinite_rows=culprits)
    return StepResult(loss, grad_norm, *counts, all_standing, seconds)


def _nonfinite_rows(
    rows: np.ndarray, parts: Sequence[tuple[int, int]], losses: Sequence[torch.Tensor]
) -> dict[int, list[int]]:
    """By rank: those of micro batches whose loss is inf or NaN. Collective; for steps that went wrong, so it may take
    its time."""
    mine = [
        row
        for (start, stop), loss in zip(parts, losses, strict=True)
        if not bool(torch.isfinite(loss))
        for row in rows[start:stop].tolist()
    ]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return {rank: theirs for rank, theirs in enumerate(found) if theirs}
