"""When a run evaluates, which evaluation was the best, and whether the run ends with it: early stopping (pure)."""

from __future__ import annotations

from dataclasses import replace

from trainer.checkpoint_manifest import Progress
from trainer.config import EvaluationConfig


def is_due(config: EvaluationConfig, step: int, num_steps: int) -> bool:
    """Whether an evaluation follows this step."""
    return step >= num_steps or (config.every_steps is not None and step % config.every_steps == 0)


def is_missing(progress: Progress, config: EvaluationConfig, num_steps: int) -> bool:
    """Whether an attempt begins with an evaluation: that of the start, or one that the attempt before was stopped in.
    For a run with a validation split."""
    if progress.step == 0:
        return config.at_start
    unknown = progress.eval_step is None and progress.eval_loss is not None  # of a release that did not note the step
    if progress.step >= num_steps and unknown:
        return False
    return is_due(config, progress.step, num_steps) and not progress.evaluated_here


def after_evaluation(progress: Progress, loss: float, config: EvaluationConfig) -> Progress:
    """With this evaluation, made at the step where the run stands."""
    if progress.best_eval_loss is None and progress.eval_loss is not None:  # of a release that did not note the best
        progress = _noted(progress, progress.eval_loss, progress.eval_step, config)
    known = replace(progress, eval_loss=loss, eval_step=progress.step)
    if known.first_eval_loss is None:
        known = replace(known, first_eval_loss=loss)
    return _noted(known, loss, progress.step, config)


def _noted(progress: Progress, loss: float, step: int | None, config: EvaluationConfig) -> Progress:
    if progress.best_eval_loss is None or loss < progress.best_eval_loss:
        progress = replace(progress, best_eval_loss=loss, best_eval_step=step)
    if progress.improved_eval_loss is None or loss < progress.improved_eval_loss - config.min_improvement:
        return replace(progress, improved_eval_loss=loss, evaluations_without_improvement=0)
    return replace(progress, evaluations_without_improvement=progress.evaluations_without_improvement + 1)


def ended_early(progress: Progress, config: EvaluationConfig, num_steps: int) -> str:
    """Why the run ends where it stands, with steps left to do; empty where it does not. It never ends between two
    evaluations, even if the patience was lowered meanwhile."""
    number = progress.evaluations_without_improvement
    patience_left = config.patience is None or number < config.patience
    if patience_left or progress.step >= num_steps or not progress.evaluated_here:
        return ""
    by = f" by more than {config.min_improvement:g}" if config.min_improvement else ""
    return (
        f"stopped early: {number} evaluation{'s' if number > 1 else ''} in a row not below "
        f"{progress.improved_eval_loss:.4f}{by}; the lowest, {progress.best_eval_loss:.4f}, was that of step "
        f"{progress.best_eval_step}"
    )


def is_over(progress: Progress, config: EvaluationConfig, num_steps: int) -> bool:
    """Whether no step is left to do."""
    return progress.step >= num_steps or bool(ended_early(progress, config, num_steps))
