"""Learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

from trainer.config import OptimizerConfig, Schedule


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Rate of the update that follows ``step`` completed ones, of ``num_steps`` in all.

    Linear warm-up from lr / warmup_steps, then the schedule down to ``lr * min_lr_ratio``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    match config.schedule:
        case Schedule.CONSTANT:
            factor = 1.0
        case Schedule.LINEAR:
            factor = 1.0 - progress
        case Schedule.COSINE:
            factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * factor)
