"""What became of a run: which steps count, what was lost, and the share of its time that was kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.doing import Doing, DoingKind
from cluster.story import NO_LAST_WORD, AttemptFacts, Facts, StepDone, StoryState, counting_steps, tell
from trainer.events import Event, EventKind
from trainer.run_directory import AttemptStart

STEP_S, START_S = 2.0, 10.0


def start(number: int, parent: str | None, step: int, claim: str = "c1", term: int = 1) -> AttemptStart:
    return AttemptStart(f"{claim}-{number}", parent, number, step, "", None, (), term, claim)


@dataclass
class Played:
    """A run as it goes: attempts that start from what is committed, train, and end."""

    clock: float = 1000.0
    attempts: dict[str, AttemptFacts] = field(default_factory=dict)
    weights: dict[int, str] = field(default_factory=dict)
    """by step the attempt whose work lies in the weights"""
    done: int = 0
    """steps, repeats included"""

    def attempt(self, from_step: int, steps: int, claim: str = "c1", term: int = 1, **ended: Any) -> str:
        parent = list(self.attempts)[-1] if self.attempts else None
        begun = start(len(self.attempts) + 1, parent, from_step, claim, term)
        self.weights = {step: by for step, by in self.weights.items() if step <= from_step}
        began, self.clock = self.clock, self.clock + START_S
        records = []
        for step in range(from_step + 1, from_step + steps + 1):
            self.clock += STEP_S
            records.append(StepDone(step, STEP_S, self.clock))
            self.weights[step] = begun.attempt
        self.done += steps
        self.attempts[begun.attempt] = AttemptFacts(begun, began, records, **ended)
        return begun.attempt

    def facts(self, newest: int, **values: Any) -> Facts:
        return Facts(self.attempts, self.clock, newest, **values)


def test_a_run_that_was_left_alone() -> None:
    played = Played()
    played.attempt(0, 40, ended=1092.0, outcome="finished", reason="all steps are done", num_workers=4)
    story = tell(played.facts(40, result="finished", result_attempts=1))
    (attempt,) = story.attempts
    assert (story.state, story.step) == (StoryState.FINISHED, 40)
    assert (attempt.state, attempt.reason, attempt.num_workers) == ("finished", "all steps are done", 4)
    assert (attempt.from_step, attempt.to_step, attempt.kept_steps, attempt.lost_steps) == (0, 40, 40, 0)
    totals = story.totals
    assert (totals.elapsed_s, totals.kept_s, totals.other_s) == (92.0, 80.0, 12.0)
    assert totals.goodput == pytest.approx(80 / 92)


def test_killed_and_gone_on_with() -> None:
    """What the first attempt did beyond its last commit is lost, and so is the time between the submissions."""
    played = Played()
    played.attempt(0, 27)
    played.clock += 100.0
    played.attempt(20, 20, claim="c2", term=2, ended=1214.0, outcome="finished")
    story = tell(played.facts(40, result="finished", result_attempts=2))
    first, second = story.attempts
    assert (first.state, first.reason, first.ended) == ("vanished", NO_LAST_WORD, 1064.0)
    assert (first.kept_steps, first.lost_steps, first.lost_s) == (20, 7, 14.0)
    assert (second.kept_steps, second.lost_steps) == (20, 0)
    totals = story.totals
    assert (totals.attempts, totals.lost_steps, totals.idle_s, totals.kept_s) == (2, 7, 100.0, 80.0)
    assert totals.elapsed_s == 214.0 and totals.other_s == pytest.approx(20.0)


def test_waiting_for_the_next_attempt_is_not_idle() -> None:
    played = Played()
    played.attempt(0, 20, ended=1050.0, outcome="failed")
    played.clock += 100.0
    played.attempt(20, 20, ended=1200.0, outcome="finished")
    totals = tell(played.facts(40)).totals
    assert (totals.idle_s, totals.kept_s, totals.other_s) == (0.0, 80.0, 120.0)


def test_steps_without_records_are_known_by_what_was_committed_or_told() -> None:
    """A killed worker's last records may not have been written."""
    played = Played()
    name = played.attempt(0, 5)
    told = Event(1020.0, EventKind.SAVED.value, "saved on a notice", name, 0, {"step": 33})
    played.attempts[name] = replace(played.attempts[name], committed_step=30, events=(told,))
    (attempt,) = tell(played.facts(30)).attempts
    assert (attempt.to_step, attempt.kept_steps, attempt.lost_steps, attempt.kept_s) == (33, 30, 3, 10.0)


def test_steps_beyond_the_newest_checkpoint_are_lost_where_nobody_is_at_work() -> None:
    played = Played()
    played.attempt(0, 27)
    interrupted = tell(played.facts(20))
    assert (interrupted.state, interrupted.step, interrupted.totals.lost_steps) == (StoryState.INTERRUPTED, 20, 7)
    alive = tell(played.facts(20, held_by="c1"))
    assert (alive.state, alive.step, alive.totals.lost_steps) == (StoryState.TRAINING, 27, 0)
    assert (alive.attempts[0].state, alive.attempts[0].ended) == ("running", None)


def test_time_goes_on_while_somebody_holds_the_run() -> None:
    played = Played()
    played.attempt(0, 10)
    played.clock += 50
    assert tell(played.facts(10, held_by="c1")).totals.elapsed_s == 80.0
    assert tell(played.facts(10)).totals.elapsed_s == 30.0


def of(claim: str | None, *, ended: float | None = None, events: Sequence[EventKind] = (), **values: Any) -> Facts:
    told = tuple(Event(1001.0, kind.value, "", "c1-1") for kind in events)
    attempt = AttemptFacts(start(1, None, 0), 1000.0, (), told, ended)
    return Facts({"c1-1": attempt}, 2000.0, held_by=claim, **values)


def waits(after: str | None, claim: str = "c1", kind: str = DoingKind.WAITING) -> Doing:
    return Doing(kind, 1600.0, "waiting for room: two GPUs", claim, after)


EXPORTS = Doing(DoingKind.EXPORTING, 1600.0, "step 40 to /x", "c1")
OVER = {"result": "finished", "result_attempts": 1, "result_by": "c1"}


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        (Facts({}, 0.0, held_by="c1"), "preparing"),
        (Facts({}, 0.0), "interrupted"),
        (of("c2"), "preparing"),
        (of("c1"), "starting"),
        (of("c1", events=[EventKind.STARTED]), "starting"),
        (of("c1", events=[EventKind.STARTED, EventKind.TRAINING]), "training"),
        (of("c1", ended=1500.0), "waiting"),
        (of(None, ended=1500.0), "interrupted"),
        (of(None, ended=1500.0, result="stopped", result_attempts=1), "stopped"),
        (of(None, ended=1500.0, result="stopped", result_attempts=0), "interrupted"),
        (of(None, ended=1500.0, result="failed", result_attempts=1), "failed"),
        (of(None, ended=1500.0, result="bad_input", result_attempts=1), "failed"),
    ],
)
def test_states(facts: Facts, state: str) -> None:
    assert tell(facts).state == state


@pytest.mark.parametrize(
    ("facts", "state", "is_told"),
    [
        (Facts({}, 0.0, held_by="c1", doing=waits(None)), "waiting", True),
        (of("c2", doing=waits(None, "c2")), "waiting", True),  # its first attempt is still to come
        (of("c1", ended=1500.0, doing=waits("c1-1")), "waiting", True),
        (of("c1", doing=waits("c1-1")), "waiting", True),  # that the attempt ended could not be written
        (of("c1", doing=waits(None)), "starting", False),  # there was room for it
        (of("c1", ended=1500.0, doing=waits(None)), "waiting", False),  # for the next attempt, that is
        (of("c2", doing=waits(None, "c1")), "preparing", False),  # another launcher waited
        (of(None, ended=1500.0, doing=waits("c1-1")), "interrupted", False),
        (of("c1", ended=1500.0, doing=waits("c1-1"), **OVER | {"result": "stopped"}), "stopped", False),  # gave up
        (of("c1", ended=1500.0, doing=waits("c1-1", kind="dreaming")), "waiting", False),  # of a later release
        (of("c1", ended=1500.0, doing=EXPORTS, **OVER), "exporting", True),
        (of("c1", doing=EXPORTS, **OVER), "exporting", True),
        (of("c1", **OVER), "finished", False),
        (of("c2", ended=1500.0, doing=EXPORTS, **OVER), "preparing", False),  # an earlier launcher exported
        (of("c1", ended=1500.0, doing=EXPORTS), "waiting", False),
        (of(None, ended=1500.0, doing=EXPORTS, **OVER), "finished", False),
    ],
)
def test_what_its_holder_does_while_no_attempt_runs(facts: Facts, state: str, is_told: bool) -> None:
    story = tell(facts)
    assert story.state == state
    assert story.doing == (facts.doing if is_told else None)
    assert [attempt.id for attempt in story.attempts if attempt.state == "running"] == (
        ["c1-1"] if state == "starting" else []
    )


def test_what_is_over_is_not_waited_for_though_it_is_held() -> None:
    """Its launcher shows the last figures to a scraper, or exports; no time of that is charged to the training."""
    played = Played()
    played.attempt(0, 40, ended=1092.0, outcome="finished")
    assert tell(played.facts(40, held_by="c1")).state == StoryState.FINISHED, "the result is yet to be written"
    played.clock += 1000.0
    over = {"held_by": "c1", "result_attempts": 1, "result_by": "c1"}
    for result, state in (("finished", "finished"), ("stopped", "stopped"), ("bad_input", "failed")):
        story = tell(played.facts(40, result=result, **over))
        assert (story.state, story.totals.elapsed_s) == (state, 92.0)


def test_attempts_of_a_launcher_that_had_lost_the_run_do_not_count() -> None:
    first, zombie, second = start(1, None, 0), start(2, "c1-1", 10), start(2, "c1-1", 10, "c2", 2)
    records = [StepDone(step, 1.0, 1000.0 + step) for step in range(1, 31)]
    facts = Facts(
        {
            "c1-1": AttemptFacts(first, 1000.0, records[:10]),
            "c1-2": AttemptFacts(zombie, 1011.0, records[10:]),
            "c2-2": AttemptFacts(second, 1012.0, records[10:], ended=1040.0),
        },
        now=1040.0,
        newest_step=30,
    )
    story = tell(facts)
    assert [attempt.state for attempt in story.attempts] == ["vanished", "superseded", "vanished"]
    assert [attempt.lost_steps for attempt in story.attempts] == [0, 20, 0]
    assert (story.totals.attempts, story.totals.kept_s, story.totals.lost_s) == (2, 30.0, 20.0)


def test_events_of_all_attempts_in_their_order() -> None:
    played = Played()
    for text, at in (("b", 2.0), ("a", 1.0)):
        name = played.attempt(0, 0)
        played.attempts[name] = replace(played.attempts[name], events=(Event(at, "notice", text, name),))
    assert [event.text for event in tell(played.facts(0)).events] == ["a", "b"]


@st.composite
def runs(draw: st.DrawFn) -> tuple[Played, int]:
    """Any chain of attempts, each from some step that an earlier one had reached, by one or several submissions."""
    played, term = Played(), 1
    for _ in range(draw(st.integers(1, 6))):
        reached = max(played.weights, default=0)
        term += draw(st.integers(0, 1))
        played.clock += draw(st.floats(0, 50))
        played.attempt(draw(st.integers(0, reached)), draw(st.integers(0, 12)), claim=f"c{term}", term=term)
    return played, draw(st.integers(0, max(played.weights, default=0)))


@given(runs())
def test_what_counts_is_what_lies_in_the_weights(run: tuple[Played, int]) -> None:
    played, newest = run
    kept = {step: by for step, by in played.weights.items() if step <= newest}
    facts = played.facts(newest)
    assert counting_steps(facts) == {
        step: next(record for record in played.attempts[by].steps if record.step == step) for step, by in kept.items()
    }
    story = tell(facts)
    assert story.step == newest and story.totals.kept_s == STEP_S * len(kept)
    assert story.totals.lost_steps == played.done - len(kept)
    assert sum(attempt.kept_steps for attempt in story.attempts) == len(kept)


@given(runs())
def test_all_of_the_time_is_accounted_for(run: tuple[Played, int]) -> None:
    played, newest = run
    for facts in (played.facts(newest), played.facts(newest, held_by=list(played.attempts.values())[-1].start.claim)):
        totals = tell(facts).totals
        assert totals.kept_s + totals.lost_s == pytest.approx(STEP_S * played.done)
        spent = totals.kept_s + totals.lost_s + totals.idle_s + totals.other_s
        assert spent == pytest.approx(totals.elapsed_s, abs=1e-6)
        assert totals.goodput is None or 0 <= totals.goodput <= 1
