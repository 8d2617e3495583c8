"""What became of a run: its attempts, what each was worth, and the share of its time that became kept steps (pure).

``cluster.story_facts`` reads what is told here; ``baton status`` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from cluster.doing import Doing, DoingKind
from cluster.failures import EndKind
from trainer.events import Event, EventKind
from trainer.run_directory import AttemptStart, fences, lineage_of

NO_LAST_WORD = "no word of its end: its launcher was killed or lost"


class StoryState(StrEnum):
    PREPARING = "preparing"
    """held; no attempt of this launcher yet"""
    WAITING = "waiting"
    """held; for room on the cluster, or for the next attempt after a failure"""
    STARTING = "starting"
    """the workers come up and load the model"""
    TRAINING = "training"
    EXPORTING = "exporting"
    """held; it is finished, and becomes files for inference"""
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """nobody holds it, and its last launcher did not say how it ended"""


class AttemptState(StrEnum):
    RUNNING = "running"
    VANISHED = "vanished"
    SUPERSEDED = "superseded"
    """of a launcher that had lost the run: nothing of it counts"""


@dataclass(frozen=True)
class StepDone:
    step: int
    seconds: float
    at: float
    """Unix seconds at its end; 0 in records of older releases"""


@dataclass(frozen=True)
class AttemptFacts:
    """What an attempt has left in its folder. All but ``start`` may be missing, or not be there yet."""

    start: AttemptStart
    started: float
    """Unix seconds"""
    steps: Sequence[StepDone] = ()
    """in any order; of a step that is named twice the last counts"""
    events: Sequence[Event] = ()
    ended: float | None = None
    """Unix seconds, where somebody wrote that it had ended"""
    outcome: str | None = None
    """``cluster.failures.EndKind`` of it, or what a later release calls so"""
    reason: str = ""
    committed_step: int | None = None
    """of its newest checkpoint that is still there"""
    num_workers: int | None = None

    @property
    def last_sign(self) -> float:
        """Unix seconds of its last sign of life."""
        signs = [self.started, *(step.at for step in self.steps), *(event.at for event in self.events)]
        return max(signs) if self.ended is None else self.ended

    @property
    def reached(self) -> int:
        """The last step that it is known to have done."""
        saved = [event.details.get("step") for event in self.events if event.kind == EventKind.SAVED]
        told = [step for step in saved if isinstance(step, int)]
        steps = [self.start.start_step, self.committed_step or 0, *told, *(step.step for step in self.steps)]
        return max(steps)


@dataclass(frozen=True)
class Facts:
    """What there is to know about a run at one moment."""

    attempts: Mapping[str, AttemptFacts]
    """all that were ever started, by id"""
    now: float
    """Unix seconds"""
    newest_step: int = 0
    """of the newest checkpoint that a successor would go on from"""
    held_by: str | None = None
    """id of the claim of the launcher that holds it"""
    result: str | None = None
    """what the last submission that came to an end wrote, with how many attempts there were then"""
    result_attempts: int = 0
    result_by: str | None = None
    """id of the claim under which it was written; None also of older releases"""
    doing: Doing | None = None
    """what a launcher, be it an earlier one, last said that it does"""


@dataclass(frozen=True)
class AttemptStory:
    number: int
    id: str
    state: str
    """an ``AttemptState``, or the ``outcome`` of one that said how it ended"""
    reason: str
    started: float
    ended: float | None
    """Unix seconds; None while it runs. Of one that vanished its last sign of life"""
    num_workers: int | None
    from_step: int
    to_step: int
    """the last that it is known to have done"""
    kept_steps: int
    kept_s: float
    lost_steps: int
    """done, and done again or still to be done again"""
    lost_s: float
    """seconds of those of them of which there are records: what was written in an attempt's last moments may be
    missing"""


@dataclass(frozen=True)
class Totals:
    attempts: int
    """that count"""
    lost_steps: int
    elapsed_s: float
    """from the first attempt's start to the end of training, or to now where somebody carries it on"""
    kept_s: float
    """of the steps that count"""
    lost_s: float
    idle_s: float
    """between submissions, when nobody ran it"""

    @property
    def other_s(self) -> float:
        """Starting, waiting, saving, evaluating."""
        return max(0.0, self.elapsed_s - self.kept_s - self.lost_s - self.idle_s)

    @property
    def goodput(self) -> float | None:
        """Share of the elapsed time that became steps that count; None before there is any."""
        return self.kept_s / self.elapsed_s if self.elapsed_s > 0 else None


@dataclass(frozen=True)
class Story:
    state: StoryState
    step: int
    """the last that counts, be it committed or not"""
    attempts: tuple[AttemptStory, ...]
    """in the order in which they began, those that do not count included"""
    events: tuple[Event, ...]
    """of all attempts, oldest first"""
    totals: Totals
    doing: Doing | None = None
    """what its holder does now, where it has said so"""


def tell(facts: Facts) -> Story:
    """The story of a run (pure)."""
    starts = {name: attempt.start for name, attempt in facts.attempts.items()}
    chain = lineage_of(starts)
    limits = _limits(facts, chain)
    running = _running(facts, chain)
    told = [
        _attempt(attempt, limits.get(name, 0), runs=name == running, counts=name in limits)
        for name, attempt in facts.attempts.items()
    ]
    told.sort(key=lambda attempt: (attempt.started, attempt.number, attempt.id))
    step = max((_counts_until(facts.attempts[name], limit) for name, limit in limits.items()), default=0)
    events = sorted((event for attempt in facts.attempts.values() for event in attempt.events), key=lambda e: e.at)
    doing = _doing(facts, chain)
    return Story(_state(facts, chain, running), step, tuple(told), tuple(events), _totals(facts, chain, told), doing)


def counting_steps(facts: Facts) -> dict[int, StepDone]:
    """By step the record that counts: of the last attempt in the chain that did it and was not fenced off (pure)."""
    chain = lineage_of({name: attempt.start for name, attempt in facts.attempts.items()})
    limits = _limits(facts, chain)
    return {
        record.step: record
        for start in chain
        for record in _by_step(facts.attempts[start.attempt]).values()
        if _is_kept(record, limits[start.attempt])
    }


def _is_kept(record: StepDone, limit: int | None) -> bool:
    return limit is None or record.step <= limit


def _counts_until(attempt: AttemptFacts, limit: int | None) -> int:
    return attempt.reached if limit is None else min(attempt.reached, limit)


def _by_step(attempt: AttemptFacts) -> dict[int, StepDone]:
    return {record.step: record for record in attempt.steps}


def _is_over(facts: Facts) -> bool:
    """Whether nobody trains any more: it was let go, or its holder has said how it ended."""
    return facts.held_by in (None, facts.result_by)


def _last_of_holder(facts: Facts, chain: Sequence[AttemptStart]) -> str | None:
    """The last attempt that the launcher which holds the run has started."""
    return chain[-1].attempt if chain and chain[-1].claim == facts.held_by else None


def _doing(facts: Facts, chain: Sequence[AttemptStart]) -> Doing | None:
    """What its holder does while no attempt runs."""
    doing = facts.doing
    if doing is None or doing.claim != facts.held_by:
        return None
    if _is_over(facts):
        return doing if doing.kind == DoingKind.EXPORTING else None
    waits = doing.kind == DoingKind.WAITING and doing.after == _last_of_holder(facts, chain)
    return doing if waits else None


def _running(facts: Facts, chain: Sequence[AttemptStart]) -> str | None:
    """The attempt whose workers may be at work: the last one, of the launcher that holds the run."""
    tip = _last_of_holder(facts, chain)
    if tip is None or _is_over(facts) or _doing(facts, chain):
        return None
    return tip if facts.attempts[tip].ended is None else None


def _limits(facts: Facts, chain: Sequence[AttemptStart]) -> dict[str, int | None]:
    """Up to which step each attempt of the chain counts. Where none runs, a successor would go on from the newest
    checkpoint, and what is beyond that is lost already."""
    limits = fences(chain)
    if _running(facts, chain) is not None:
        return limits
    return {
        name: facts.newest_step if limit is None else min(limit, facts.newest_step) for name, limit in limits.items()
    }


def _attempt(attempt: AttemptFacts, limit: int | None, *, runs: bool, counts: bool) -> AttemptStory:
    start, records, reached = attempt.start, _by_step(attempt).values(), attempt.reached
    kept = [record for record in records if counts and _is_kept(record, limit)]
    lost = [record for record in records if not (counts and _is_kept(record, limit))]
    kept_steps = max(0, _counts_until(attempt, limit) - start.start_step) if counts else 0
    state, reason = _end(attempt, runs=runs, counts=counts)
    return AttemptStory(
        number=start.number,
        id=start.attempt,
        state=state,
        reason=reason,
        started=attempt.started,
        ended=None if runs else attempt.last_sign,
        num_workers=attempt.num_workers,
        from_step=start.start_step,
        to_step=reached,
        kept_steps=kept_steps,
        kept_s=sum(record.seconds for record in kept),
        lost_steps=reached - start.start_step - kept_steps,
        lost_s=sum(record.seconds for record in lost),
    )


def _end(attempt: AttemptFacts, *, runs: bool, counts: bool) -> tuple[str, str]:
    """Its state, and why."""
    if not counts:
        return AttemptState.SUPERSEDED.value, attempt.reason or "another launcher had taken the run over"
    if runs:
        return AttemptState.RUNNING.value, attempt.reason
    if attempt.outcome is None:
        return AttemptState.VANISHED.value, attempt.reason or NO_LAST_WORD
    return attempt.outcome, attempt.reason


def _state(facts: Facts, chain: Sequence[AttemptStart], running: str | None) -> StoryState:
    if facts.held_by is None:
        if facts.result is None or facts.result_attempts < len(chain):  # what is written is of an earlier submission
            return StoryState.INTERRUPTED
        return _as_it_ended(facts)
    if doing := _doing(facts, chain):
        return StoryState(doing.kind)
    if _is_over(facts):
        return _as_it_ended(facts)
    if running is not None:
        attempt = facts.attempts[running]
        training = attempt.steps or any(event.kind == EventKind.TRAINING for event in attempt.events)
        return StoryState.TRAINING if training else StoryState.STARTING
    tip = _last_of_holder(facts, chain)
    if tip is None:
        return StoryState.PREPARING
    return StoryState.FINISHED if facts.attempts[tip].outcome == EndKind.FINISHED else StoryState.WAITING


def _as_it_ended(facts: Facts) -> StoryState:
    return StoryState(facts.result) if facts.result in set(StoryState) else StoryState.FAILED


def _totals(facts: Facts, chain: Sequence[AttemptStart], told: Sequence[AttemptStory]) -> Totals:
    first = min((attempt.started for attempt in told), default=facts.now)
    last = max((facts.attempts[attempt.id].last_sign for attempt in told), default=first)
    end = last if _is_over(facts) else max(facts.now, last)
    return Totals(
        attempts=len(chain),
        lost_steps=sum(attempt.lost_steps for attempt in told),
        elapsed_s=max(0.0, end - first),
        kept_s=sum(record.seconds for record in counting_steps(facts).values()),
        lost_s=sum(attempt.lost_s for attempt in told),
        idle_s=_idle_s(facts, chain),
    )


def _idle_s(facts: Facts, chain: Sequence[AttemptStart]) -> float:
    """Between the last sign of life of a submission's last attempt and the first attempt of the next submission."""
    attempts = [facts.attempts[start.attempt] for start in chain]
    pairs = [(a, b) for a, b in pairwise(attempts) if a.start.claim != b.start.claim]
    return sum(max(0.0, later.started - earlier.last_sign) for earlier, later in pairs)
