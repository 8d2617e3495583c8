"""Early stopping: which evaluation was the best, and whether the run has waited long enough for a better one (pure)."""

from __future__ import annotations

from dataclasses import replace

from trainer.checkpoint_manifest import Progress
from trainer.config import EvaluationConfig


def after_evaluation(progress: Progress, loss: float, config: EvaluationConfig) -> Progress:
    """With this evaluation, made at the step where the run stands."""
    best = progress.best_eval_loss
    is_best = best is None or loss < best - config.min_improvement
    return replace(
        progress,
        eval_loss=loss,
        first_eval_loss=loss if progress.first_eval_loss is None else progress.first_eval_loss,
        eval_step=progress.step,
        best_eval_loss=loss if is_best else best,
        best_eval_step=progress.step if is_best else progress.best_eval_step,
        evaluations_since_best=0 if is_best else progress.evaluations_since_best + 1,
    )


def ended_early(progress: Progress, config: EvaluationConfig) -> str:
    """Why the run ends where it stands, whether or not that is its last step; empty where it does not. Only an
    evaluation ends it: a patience that was lowered since counts from the next one on."""
    number = progress.evaluations_since_best
    if config.patience is None or number < config.patience or not progress.evaluated_here:
        return ""
    best = f"step {progress.best_eval_step} had the lowest evaluation loss, {progress.best_eval_loss:.4f}"
    return f"stopped early: {best}, and {number} evaluations since then had none lower"
