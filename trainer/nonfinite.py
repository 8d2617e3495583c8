"""What follows a step whose loss or gradients were inf or NaN. Its update was left out, on all ranks alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from trainer.checkpoint_manifest import Progress
from trainer.config import OnNonFinite, TrainingConfig
from trainer.errors import NonFiniteAgain, NonFiniteStep
from trainer.events import EventKind, EventLog
from trainer.progress_log import ProgressLog
from trainer.step import StepResult

_MOST_ROWS = 16
_ADVICE = (
    "No update was made of it, and the last checkpoint is intact. Look at these rows, lower optimizer.lr, lengthen "
    "optimizer.warmup_steps"
)


def describe(step: int, loss: float, rows_by_rank: Mapping[int, Sequence[int]]) -> str:
    """What happened, in words (pure).

    Args:
        rows_by_rank: rows of the micro batches whose own loss was not finite.
    """
    if not rows_by_rank:
        return f"step {step}: the loss is {loss:.6g}, but the gradient norm is inf or NaN"
    where = "; ".join(
        f"rank {rank} with rows {', '.join(map(str, rows[:_MOST_ROWS]))}{' …' if len(rows) > _MOST_ROWS else ''}"
        for rank, rows in list(rows_by_rank.items())[:_MOST_ROWS]
    )
    return f"step {step}: the loss is {loss} on {where} of the dataset"


def after_step(
    progress: Progress, result: StepResult, config: TrainingConfig, log: ProgressLog, events: EventLog | None
) -> Progress:
    """Counts the steps that were left out. All ranks decide alike: what a result says of this, all have agreed on.

    Args:
        progress: after the step.
        events: of rank 0; None elsewhere.

    Raises:
        NonFiniteStep: the run is to stop there.
        NonFiniteAgain: the attempt is to be given up, and begun again from the last checkpoint.
    """
    if result.applied:
        return replace(progress, skipped_in_a_row=0) if progress.skipped_in_a_row else progress
    what = describe(progress.step, result.loss, result.nonfinite_rows)
    if events is not None:
        events.record(EventKind.NONFINITE, what, step=progress.step, rows=result.nonfinite_rows)
    match config.on_nonfinite:
        case OnNonFinite.STOP:
            raise NonFiniteStep(f"{what}. {_ADVICE}, or leave such steps out (training.on_nonfinite=skip)")
        case OnNonFinite.ROLLBACK:
            raise NonFiniteAgain(f"{what}. {_ADVICE}, if it comes again at this step")
    in_a_row, most = progress.skipped_in_a_row + 1, config.max_skipped_in_a_row
    if in_a_row > most:
        raise NonFiniteStep(
            f"{what}, and so were the {most} steps before it (training.max_skipped_in_a_row). The weights have "
            f"diverged, or the data is broken. {_ADVICE}"
        )
    log.say(f"{what}; its update is left out ({in_a_row} in a row, of {most} at most)")
    return replace(progress, skipped_steps=progress.skipped_steps + 1, skipped_in_a_row=in_a_row)
