"""Promise 5 along a chain of sizes: 2, 1, 3, 2 workers in one run, killed in between while a save is under way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from data_shards.order.sampler import Sampler
from data_shards.storage import Storage
from tests.support.checkpoints import committed
from tests.support.distributed import run_workers
from tests.support.engines import make_engine
from tests.support.plain_loop import plain_run
from tests.support.tiny import DRAFT, ragged_packs, save_now, save_tiny_model
from trainer import checkpoint
from trainer.checkpoint_manifest import CheckpointManifest, Progress
from trainer.config import LoraConfig, Method, OptimizerConfig, Schedule
from trainer.engine import ZeroEngine, build_optimizer
from trainer.model import add_lora
from trainer.saving import Saver
from trainer.step import row_digest, train_step

SIZES, UNTIL = (2, 1, 3, 2), (7, 13, 19, 28)
BATCH = 6
PACKS = ragged_packs(19, seed=3)
SAMPLER = Sampler(num_rows=19, seed=5, global_batch=BATCH, total_rows=BATCH * UNTIL[-1])
RATIOS = {Method.FULL: {"embed_tokens": 0.25}, Method.LORA: {"lora_B": 4.0}}


class Step(NamedTuple):
    loss: float
    rows_digest: int


def optimizer_of(method: Method) -> OptimizerConfig:
    return OptimizerConfig(
        lr=1e-3, weight_decay=0.1, max_grad_norm=0.5, schedule=Schedule.CONSTANT, lr_ratios=RATIOS[method]
    )


def draft_of(step: int) -> CheckpointManifest:
    return replace(DRAFT, progress=Progress(step=step, rows_consumed=step * BATCH))


def train(engine: ZeroEngine, method: Method, start: int, stop: int) -> dict[int, Step]:
    lr, found = optimizer_of(method).lr, {}
    for step in range(start, stop):
        rows = SAMPLER.rows_of_step(step)
        done = train_step(engine, PACKS, rows, step=step, seed=5, micro_batch_size=2, learning_rate=lr)
        found[step] = Step(done.loss, done.rows_digest)
    return found


def stage(base: str, root: str, method: Method, until: int) -> tuple[int, dict[int, Step]]:
    """From the newest checkpoint to a save at ``until``; then two steps more, and a save that is not waited for."""
    engine, checkpoints = make_engine(base, optimizer_of(method), method=method), Storage.at(root)
    found = committed(checkpoints)
    start = found[-1].step if found else 0
    if found:
        checkpoint.load(engine, checkpoints, found[-1])
    done = train(engine, method, start, until)
    save_now(engine, checkpoints, draft_of(until))
    if until < UNTIL[-1]:
        done |= train(engine, method, until, until + 2)  # lost, unless the save of them is committed
        Saver(engine, checkpoints, commit_timeout_s=60).begin(draft_of(until + 2))
    return start, done


def left_alone(base: str, method: Method) -> dict[int, Step]:
    return train(make_engine(base, optimizer_of(method), method=method), method, 0, UNTIL[-1])


def plain_losses(base: str, method: Method, micro_batch: int) -> np.ndarray:
    """Of plain PyTorch, with the groups built by our own function: fp64 [steps]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if method == Method.LORA:
        model = add_lora(model, LoraConfig(rank=4), seed=0)  # as make_engine does
    batches = [[PACKS.pack(int(row)) for row in SAMPLER.rows_of_step(step)] for step in range(UNTIL[-1])]
    config = optimizer_of(method)

    def make(plain: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(plain, config)
        assert {group["lr"] / config.lr for group in optimizer.param_groups} == {1.0, *RATIOS[method].values()}
        return optimizer

    return np.array(
        plain_run(Path(base), batches, make, config.max_grad_norm, micro_batch=micro_batch, model=model).losses
    )


def apart(losses: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.abs(losses / others - 1)


@pytest.mark.parametrize("method", [Method.FULL, Method.LORA])
def test_a_chain_of_sizes_with_kills_between(tmp_path: Path, method: Method) -> None:
    base = str(save_tiny_model(tmp_path / "base", "qwen2", tied=True))
    chain: dict[int, Step] = {}
    starts = []
    for world_size, until in zip(SIZES, UNTIL, strict=True):
        last = until == UNTIL[-1]
        start, found = run_workers(
            stage, world_size, base, str(tmp_path / "saved"), method, until, then_killed=not last
        )[0]
        starts.append(start)
        chain |= found
    assert starts[0] == 0 and all(start in (until, until + 2) for start, until in zip(starts[1:], UNTIL, strict=False))
    undisturbed = run_workers(left_alone, SIZES[0], base, method)[0]
    steps = range(UNTIL[-1])
    digests = [sum(row_digest(int(row)) for row in SAMPLER.rows_of_step(step)) for step in steps]
    assert [undisturbed[step].rows_digest for step in steps] == digests
    assert [chain[step].rows_digest for step in steps] == digests
    plain = [plain_losses(base, method, size) for size in (1, 2, 3, 6)]
    allowed = 3 * max(apart(other, plain[0]).max() for other in plain[1:])
    expected = np.array([undisturbed[step].loss for step in steps])
    drift = apart(np.array([chain[step].loss for step in steps]), expected)
    print(
        f"{method}: {'-'.join(map(str, SIZES))} from {starts}: drift {drift.max():.1e} (allowed {allowed:.1e}), final "
        f"{drift[-1]:.1e}; from plain PyTorch {apart(expected, plain[0]).max():.1e}"
    )
    assert drift.max() <= allowed and drift[-1] <= 1e-5
    assert apart(expected, plain[0]).max() <= 1e-5, "the groups' learning rates are those of plain PyTorch"
