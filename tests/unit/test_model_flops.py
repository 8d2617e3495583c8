"""The formulas against PyTorch's own count of what a real model computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_shards.pack import Pack
from tests.support.tiny import VOCAB, tiny_config
from trainer.batch import collate
from trainer.config import Attention, LoraConfig, Method, ModelConfig, Precision
from trainer.loss import token_loss_sum
from trainer.model import build_trained_model
from trainer.model_flops import StepSize, step_flops
from trainer.model_shape import model_shape

LORA = LoraConfig(rank=4)


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_formulas_equal_a_count(tmp_path: Path, method: Method, family: str, tied: bool) -> None:
    tiny_config(family, tied=tied).save_pretrained(tmp_path)
    config = ModelConfig(
        base=str(tmp_path), random_init=True, precision=Precision.FP32, attention=Attention.EAGER
    )  # eager computes whole squares, which the counter sees
    model = build_trained_model(tmp_path, config, method, LORA, None, seed=0)
    rng = np.random.default_rng(0)
    pack = Pack(rng.integers(0, VOCAB, 40).astype(np.int32), rng.random(40) < 0.6, np.array([40], np.int32))
    batch = collate([pack])
    size = StepSize.of([pack])
    assert (size.tokens, size.trained_tokens, size.squared_lengths) == (40, batch.num_trained, 1600)
    with FlopCounterMode(display=False) as counter:
        token_loss_sum(model, batch).backward()
    shape = model_shape(tiny_config(family, tied=tied), Precision.FP32, method, LORA)
    flops = step_flops(shape, size)
    assert flops.layers + flops.head + 2 * flops.attention == counter.get_total_flops()


def test_packed_sequences_pay_their_own_squares() -> None:
    trained = np.ones(30, bool)
    pack = Pack(np.zeros(30, np.int32), trained, np.array([10, 20], np.int32))
    assert StepSize.of([pack, pack]) == (60, 56, 1000)
    assert trained.all(), "the pack itself is left as it is"
    assert torch.equal(collate([pack]).cu_seq_lens, torch.tensor([0, 10, 30], dtype=torch.int32))
