"""Steps in bf16 on the device against plain fp32 PyTorch on the CPU; packs that never see each other."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.engines import SGD, make_engine
from tests.support.gpu import DEVICE, needs_device
from tests.support.plain_loop import PlainRun, plain_run
from tests.support.tiny import MemoryPacks, ragged_packs
from trainer.batch import collate
from trainer.config import Attention, LoraConfig, Method, ModelConfig, OptimizerConfig, Precision
from trainer.engine import ZeroEngine
from trainer.loss import token_loss_sum
from trainer.model import build_trained_model
from trainer.step import StepResult, train_step

pytestmark = needs_device

PACKS: MemoryPacks = ragged_packs(12, seed=4, longest=60)
STEPS, BATCH = 3, 4


def rows(step: int) -> np.ndarray:
    return np.arange(step * BATCH, (step + 1) * BATCH)


def train(engine: ZeroEngine, optimizer: OptimizerConfig, steps: int = STEPS) -> list[StepResult]:
    return [
        train_step(
            engine, PACKS, rows(step), step=step, seed=0, micro_batch_size=2, learning_rate=optimizer.lr
        )
        for step in range(steps)
    ]  # fmt: skip


def reference(base: str, method: Method, trained: dict[str, torch.Tensor]) -> PlainRun:
    """The same steps by plain PyTorch on the CPU in fp32, from the same trained weights."""
    config = ModelConfig(base=base, precision=Precision.FP32, attention=Attention.SDPA)
    model = build_trained_model(Path(base), config, method, LoraConfig(rank=4), None, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(trained[name].reshape(parameter.shape))

    def make(model: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=SGD.lr)

    batches = [[PACKS.pack(int(row)) for row in rows(step)] for step in range(STEPS)]
    return plain_run(Path(base), batches, make, SGD.max_grad_norm, model=model)


@pytest.mark.parametrize("attention", [Attention.PACKED, Attention.SDPA, Attention.EAGER])
@pytest.mark.parametrize("method", list(Method))
def test_bf16_steps_stay_close_to_fp32_on_a_cpu(base: str, method: Method, attention: Attention) -> None:
    assert DEVICE is not None
    engine = make_engine(base, SGD, method=method, precision=Precision.BF16, attention=attention)
    assert engine.device.type == DEVICE.type, "the engine must run where the test thinks it does"
    start = {name.removesuffix("/fp32"): value.cpu().clone() for name, value in engine.local_slices()}
    results = train(engine, SGD)
    expected = reference(base, method, start)
    print([(r.loss, r.grad_norm) for r in results], expected.losses, expected.grad_norms)
    assert [r.loss for r in results] == pytest.approx(expected.losses, rel=1e-2)
    assert [r.grad_norm for r in results] == pytest.approx(expected.grad_norms, rel=5e-2)
    assert results[-1].loss != results[0].loss


def attentions() -> list[Any]:
    missing = importlib.util.find_spec("flash_attn") is None
    flash = pytest.mark.skipif(missing, reason="the flash-attn package is not installed")
    return [Attention.PACKED, Attention.SDPA, Attention.EAGER, pytest.param(Attention.FLASH, marks=flash)]


@pytest.mark.parametrize("attention", attentions())
def test_a_neighbour_in_the_pack_changes_nothing(base: str, attention: Attention) -> None:
    """The logits of a sequence are the same whatever stands before it, and differ once it is seen: bf16."""
    assert DEVICE is not None
    from transformers import AutoModelForCausalLM

    from trainer import attention as packed

    packed.register()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, attn_implementation=attention.value)
    model = model.to(DEVICE).eval()
    probe, others = PACKS.pack(0), [PACKS.pack(1), PACKS.pack(2)]

    @torch.no_grad()
    def loss(packs: list[Any]) -> float:
        return token_loss_sum(model, collate(packs).to(DEVICE)).item()

    alone = [loss([pack]) for pack in (probe, *others)]
    together = loss([*others, probe])
    merged = others[0]._replace(sequence_lengths=np.array([others[0].input_ids.size], np.int32))
    leaking = loss([merged])
    print(
        f"{attention.value}: apart {sum(alone):.4f}, together {together:.4f}; leaking {leaking:.4f} not {alone[1]:.4f}"
    )
    assert together == pytest.approx(sum(alone), rel=2e-3)
    assert abs(leaking / alone[1] - 1) > 1e-2, "one sequence where there were several must show"
