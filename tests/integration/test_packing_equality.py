"""Promise 3: packed sequences never see each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.plain_loop import pack_loss_sum
from tests.support.tiny import ragged_packs, save_tiny_model
from trainer.attention import PACKED, register
from trainer.batch import collate
from trainer.loss import token_loss_sum


class Leaking:
    """Mutant: the all-ones mask that silently turns packing off; for our own attention, bounds of one sequence."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **inputs: Any) -> Any:
        ids = inputs["input_ids"]
        if self.model.config._attn_implementation == PACKED:
            return self.model(**inputs | {"cu_seq_lens_q": torch.tensor([0, ids.numel()], dtype=torch.int32)})
        return self.model(**inputs | {"attention_mask": torch.ones_like(ids)})


@pytest.mark.parametrize("attention", [PACKED, "sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_packed_equals_unpacked(tmp_path: Path, attention: str, family: str) -> None:
    from transformers import AutoModelForCausalLM

    register()
    base = save_tiny_model(tmp_path, family)
    window = {"sliding_window": 5} if family == "mistral" else {}  # shorter than the sequences
    packs = ragged_packs(4, seed=1).all

    def run(loss_of: Any, attention: str = attention) -> tuple[float, dict[str, torch.Tensor]]:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation=attention, **window)
        loss = loss_of(model)
        loss.backward()
        return loss.item(), {name: p.grad for name, p in model.named_parameters()}

    loss, gradients = run(lambda model: token_loss_sum(model, collate(packs)))
    plain = "sdpa" if attention == PACKED else attention
    expected, expected_gradients = run(lambda model: sum(pack_loss_sum(model, pack) for pack in packs), plain)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, name
    leaked, _ = run(lambda model: token_loss_sum(Leaking(model), collate(packs)))
    assert abs(leaked / expected - 1) > 1e-4, "attention across sequences must show"
