"""Engines around tiny models, on the workers of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.config import (
    LoraConfig,
    Method,
    ModelConfig,
    OptimizerConfig,
    OptimizerName,
    Precision,
    Schedule,
    ZeroConfig,
)
from trainer.deepspeed_config import deepspeed_config
from trainer.engine import ZeroEngine, build_optimizer
from trainer.model import build_trained_model

ADAMW = OptimizerConfig(lr=1e-3, weight_decay=0.1, max_grad_norm=0.5, schedule=Schedule.CONSTANT)
SGD = OptimizerConfig(name=OptimizerName.SGD, lr=0.05, max_grad_norm=0.0, schedule=Schedule.CONSTANT)


def make_engine(
    base: str,
    optimizer: OptimizerConfig,
    kind: type[ZeroEngine] = ZeroEngine,
    method: Method = Method.FULL,
    precision: Precision = Precision.FP32,
    **model_options: Any,
) -> ZeroEngine:
    config = deepspeed_config(precision, optimizer.max_grad_norm, ZeroConfig(param_persistence_threshold=50))
    model = build_trained_model(
        Path(base),
        ModelConfig(base=base, precision=precision, **model_options),
        method,
        LoraConfig(rank=4),
        config,
        seed=0,
    )
    return kind(model, build_optimizer(model, optimizer), config)


def full_weights(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    """Whole parameters from the ranks' slices, on every rank."""
    import deepspeed

    weights = {}
    for entry in engine.trained:
        with deepspeed.zero.GatheredParameters(entry.parameter):
            weights[entry.name] = entry.parameter.detach().clone()
    return weights
