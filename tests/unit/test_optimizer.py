"""Which parameters learn how fast and which decay, before any engine is there."""

from __future__ import annotations

import pytest
import torch

from data_shards.errors import BadInput
from trainer.config import OptimizerConfig
from trainer.engine import build_optimizer

BASE = OptimizerConfig(lr=1e-3, weight_decay=0.1)


def model() -> torch.nn.Module:
    """``embed.weight``, ``layers.0.weight``, ``layers.0.bias``, ``layers.1.weight`` (frozen)."""
    layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False)])
    layers[1].requires_grad_(False)
    return torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 3), "layers": layers})


def found(**ratios: float) -> dict[str, tuple[float, float]]:
    """(ratio of the learning rate, weight decay) by name of the trained parameters."""
    built = model()
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    optimizer = build_optimizer(built, BASE.model_copy(update={"lr_ratios": ratios}))
    for group in optimizer.param_groups:
        assert group["lr"] == BASE.lr * group["lr_ratio"]
    return {
        names[id(parameter)]: (group["lr_ratio"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_without_ratios_all_learn_alike_and_matrices_decay() -> None:
    assert found() == {"embed.weight": (1.0, 0.1), "layers.0.weight": (1.0, 0.1), "layers.0.bias": (1.0, 0.0)}


def test_the_longest_fitting_text_decides() -> None:
    """Whatever order they are written in."""
    wanted = {"embed.weight": (0.5, 0.1), "layers.0.weight": (3.0, 0.1), "layers.0.bias": (2.0, 0.0)}
    ratios = {"weight": 0.5, "layers": 2.0, "layers.0.weight": 3.0}
    assert found(**ratios) == found(**dict(reversed(ratios.items()))) == wanted


def test_a_text_that_no_trained_parameter_holds_is_named() -> None:
    with pytest.raises(BadInput, match=r"^optimizer\.lr_ratios\.lora_B: no trained .* called \['embed\.weight', "):
        found(embed=2.0, lora_B=16.0)
    with pytest.raises(BadInput, match=r"optimizer\.lr_ratios\.layers\.1: "):
        found(**{"layers.1": 2.0})  # frozen
