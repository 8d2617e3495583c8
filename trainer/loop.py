"""The training loop: steps, evaluations, commits, until the end or a wish to stop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from typing import Protocol

from data_shards.order.sampler import Sampler
from data_shards.reading.shard_reader import SplitReader
from trainer.checkpoint_manifest import Progress
from trainer.checkpointing import Checkpointing
from trainer.config import TrainerConfig
from trainer.engine import ZeroEngine
from trainer.evaluate import EvaluationGivenUp, evaluate
from trainer.evaluations import after_evaluation, is_due, is_missing, is_over
from trainer.events import EventLog
from trainer.metrics import Reporter, StepFigures
from trainer.nonfinite import after_step
from trainer.progress_log import ProgressLog
from trainer.pulse import Phase, Pulse
from trainer.schedule import learning_rate
from trainer.step import PackSource, StepResult, train_step
from trainer.stragglers import Stragglers

_STEPS_AHEAD = 4


class Outcome(StrEnum):
    FINISHED = "finished"
    STOPPED = "stopped"


class Stop(Protocol):
    """A wish that the attempt save and end."""

    @property
    def requested(self) -> bool: ...

    @property
    def seconds_left(self) -> float:
        """Until the workers may be gone; infinite where that is not known."""
        ...


@dataclass
class Loop:
    """One attempt's life on one rank. All ranks run it alike; what one rank wishes (a stop) all learn in a step's own
    all-reduce, so that they always do the same."""

    engine: ZeroEngine
    config: TrainerConfig
    sampler: Sampler
    train: SplitReader
    validation: PackSource | None
    progress: Progress
    checkpointing: Checkpointing
    stop: Stop
    log: ProgressLog
    reporter: Reporter
    pulse: Pulse = field(default_factory=Pulse)
    events: EventLog | None = None
    """of rank 0"""
    stragglers: Stragglers | None = None
    saved: bool = field(default=False, init=False)
    """once it has run: whether all that was done is committed"""
    _asked_until: int = field(default=0, init=False)
    """step up to which rows were asked for"""

    def run(self) -> Outcome:
        """Raises NonFiniteStep, StepInvariantBroken or SaveFailed; nothing committed is touched then."""
        stop = self._evaluation_is_missing() and not self._evaluate()
        while not self._is_over() and not stop:
            standing = self._step().standing
            stop, step = standing.stop_requested, self.progress.step
            self.checkpointing.look_after(self.progress, standing)
            if not stop and is_due(self.config.evaluation, step, self.sampler.num_steps):
                stop = not self._evaluate()
            if not self._is_over() and not stop:
                self._add({"checkpoint": self.checkpointing.save_if_due(self.progress, standing)})
        self.pulse.beat(Phase.ENDING)
        self.saved = not (stop and self._is_too_late_to_save())
        if self.saved:
            self._add({"checkpoint": self.checkpointing.save_at_end(self.progress)})
        done = self._is_over() and not self._evaluation_is_missing()
        if not done or not self.saved:
            told = "progress is saved" if self.saved else "there was no time to save it"
            self.log.say(f"stopped on request after step {self.progress.step}; {told}")
            return Outcome.STOPPED
        return Outcome.FINISHED

    def _is_over(self) -> bool:
        return is_over(self.progress, self.config.evaluation, self.sampler.num_steps)

    def _is_too_late_to_save(self) -> bool:
        """Whether the workers will be gone before as much time as the last save took. Collective."""
        needed = self.checkpointing.last_save_seconds
        return self.checkpointing.saver.anywhere(self.stop.requested and self.stop.seconds_left < needed)

    def _evaluation_is_missing(self) -> bool:
        if self.validation is None:
            return False
        return is_missing(self.progress, self.config.evaluation, self.sampler.num_steps)

    def _step(self) -> StepResult:
        """One optimizer step."""
        done = self.progress.step
        self.pulse.begin_step(done + 1)
        self._fetch_ahead(done)
        rate = learning_rate(self.config.optimizer, done, self.sampler.num_steps)
        timer = _Timer()
        result = train_step(
            self.engine,
            self.train,
            self.sampler.rows_of_step(done),
            step=done,
            seed=self.config.seed,
            micro_batch_size=self.config.training.micro_batch,
            learning_rate=rate,
            standing=self.checkpointing.standing()._replace(stop_requested=self.stop.requested),
            enter=self.pulse.enter,
        )
        self.pulse.end_step()
        seconds = timer.stop() - result.seconds_by_part["checkpoint"]
        self.progress = replace(
            self.progress,
            step=done + 1,
            rows_consumed=self.progress.rows_consumed + result.rows,
            tokens=self.progress.tokens + result.tokens,
            trained_tokens=self.progress.trained_tokens + result.trained_tokens,
            last_loss=result.loss if result.applied else self.progress.last_loss,
        )
        self._add(result.seconds_by_part)
        self.log.step(done + 1, result, rate, seconds)
        if self.stragglers is not None:
            self.stragglers.after_step(done + 1, result.seconds_by_part)
        self.progress = after_step(self.progress, result, self.config.training, self.log, self.events)
        slowest = self.stragglers.slowest_ratio if self.stragglers is not None else None
        figures = StepFigures(rate, result.grad_norm, self.log.tokens_per_second, slowest)
        self.reporter.stepped(self.progress, figures)
        return result

    def _fetch_ahead(self, done: int) -> None:
        """Shards of the coming steps are fetched and verified while this one computes."""
        for step in range(max(self._asked_until, done), min(done + 1 + _STEPS_AHEAD, self.sampler.num_steps)):
            self.train.prefetch(self.sampler.rows_of_step(step))
            self._asked_until = step + 1

    def _evaluate(self) -> bool:
        """Whether it was done, or there is nothing to do; else it was given up for a wish to stop."""
        if self.validation is None:
            return True
        timer = _Timer()
        beat = partial(self.pulse.beat, Phase.EVALUATION)
        wanted = self.config.evaluation
        try:
            result = evaluate(self.engine, self.validation, wanted.micro_batch, beat, lambda: self.stop.requested)
        except EvaluationGivenUp:
            self.log.say(f"the evaluation of step {self.progress.step} was given up")
            return False
        self._add({"evaluation": timer.stop()})
        self.progress = after_evaluation(self.progress, result.loss, wanted)
        self.log.evaluation(self.progress.step, result)
        self.reporter.evaluated(self.progress)
        return True

    def _add(self, seconds: Mapping[str, float]) -> None:
        """To the run's wall seconds, by kind."""
        self.progress = replace(self.progress, seconds=added(self.progress.seconds, seconds))


def added(seconds: Mapping[str, float], more: Mapping[str, float]) -> dict[str, float]:
    """The sum of both, by kind (pure)."""
    return {kind: seconds.get(kind, 0.0) + more.get(kind, 0.0) for kind in {**seconds, **more}}


class _Timer:
    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds = 0.0

    def stop(self) -> float:
        self.seconds = time.perf_counter() - self.started
        return self.seconds
