"""The story of a run as lines of text (pure)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from cluster.story import AttemptStory, Story, StoryState
from trainer.events import Event, EventKind
from trainer.progress_log import duration

_SHOWN = 15
"""Attempts and events: with all else on one screen."""
_SAID_BY_ATTEMPTS = {EventKind.STARTED, EventKind.TRAINING, EventKind.ENDED}
_OVER = {StoryState.FINISHED, StoryState.STOPPED, StoryState.FAILED}


@dataclass(frozen=True)
class Durable:
    name: str
    step: int
    created: float
    """Unix seconds"""


@dataclass(frozen=True)
class Told:
    """A story and what surrounds it."""

    uri: str
    now: float
    """Unix seconds"""
    story: Story
    num_steps: int | None
    held_by: str | None
    """who holds the run, since when, its last heartbeat; None: nobody"""
    silent: bool
    """its heartbeat stands still, so that it may be dead"""
    reason: str
    """for which the last submission that came to an end did so"""
    written: str
    """and when"""
    durable: Durable | None
    """the newest checkpoint that can be read from anywhere"""


def lines_of(told: Told, *, everything: bool = False) -> list[str]:
    return [
        f"run {told.uri}",
        *_state(told),
        f"step {told.story.step:,} of {f'{told.num_steps:,}' if told.num_steps else 'a number not known yet'}",
        _checkpoint(told),
        "",
        *_attempts(told, everything=everything),
        *_events(told, everything=everything),
        "",
        *_totals(told.story),
    ]


def _state(told: Told) -> list[str]:
    state = told.story.state
    if told.held_by is not None:
        silent = ". It is silent: perhaps dead, then the run can be gone on with by the same command"
        return [f"{state.value}: held by {told.held_by}{silent if told.silent else ''}", *_doing(told)]
    if state in _OVER:
        return [f"{state.value} {told.written}: {told.reason}"]
    return [f"{state.value}: nobody holds it; the same command goes on from the newest checkpoint"]


def _doing(told: Told) -> list[str]:
    doing = told.story.doing
    if doing is None:
        return []
    return [f"since {_time(doing.since)} ({duration(max(0.0, told.now - doing.since))}): {_one_line(doing.text, 500)}"]


def _checkpoint(told: Told) -> str:
    if told.durable is None:
        return "no durable checkpoint yet"
    age = duration(max(0.0, told.now - told.durable.created))
    return f"newest durable checkpoint: step {told.durable.step:,}, {age} old ({told.durable.name})"


def _attempts(told: Told, *, everything: bool) -> list[str]:
    attempts = told.story.attempts
    left_out = 0 if everything else max(0, len(attempts) - _SHOWN)
    head = [f"{'attempt':<20} {'began (UTC)':<19} {'took':>6} {'workers':>7} {'steps':>15} {'lost':>13}  ended"]
    more = [f"… {left_out} earlier attempts (--all)"] if left_out else []
    return head + more + [_attempt(attempt, told.now) for attempt in attempts[left_out:]]


def _attempt(attempt: AttemptStory, now: float) -> str:
    name = f"{attempt.number} {attempt.id}"
    took = duration(max(0.0, (attempt.ended or now) - attempt.started))
    workers = "?" if attempt.num_workers is None else str(attempt.num_workers)
    steps = f"{attempt.from_step}→{attempt.to_step}"
    lost = f"{attempt.lost_steps} ({duration(attempt.lost_s)})" if attempt.lost_steps else "-"
    why = f"{attempt.state}: {_one_line(attempt.reason)}" if attempt.reason else attempt.state
    return f"{name:<20} {_time(attempt.started):<19} {took:>6} {workers:>7} {steps:>15} {lost:>13}  {why}"


def _one_line(text: str, longest: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _events(told: Told, *, everything: bool) -> list[str]:
    worth = [event for event in told.story.events if everything or event.kind not in _SAID_BY_ATTEMPTS]
    left_out = 0 if everything else max(0, len(worth) - _SHOWN)
    if not worth:
        return []
    more = [f"… {left_out} earlier events (--all)"] if left_out else []
    return ["", "events", *more, *(_event(event, told.story.attempts) for event in worth[left_out:])]


def _event(event: Event, attempts: Sequence[AttemptStory]) -> str:
    number = next((str(attempt.number) for attempt in attempts if attempt.id == event.attempt), event.attempt)
    where = f"attempt {number}" + ("" if event.rank is None else f" rank {event.rank}")
    return f"{_time(event.at)}  {event.kind:<12} {where}: {_one_line(event.text)}"


def _totals(story: Story) -> list[str]:
    totals = story.totals
    if totals.goodput is None:
        return [f"attempts {totals.attempts}"]
    parts = [
        f"{duration(totals.kept_s)} in steps that count",
        f"{duration(totals.lost_s)} in steps that were lost",
        f"{duration(totals.idle_s)} between submissions",
        f"{duration(totals.other_s)} starting, waiting, evaluating and saving",
    ]
    return [
        f"attempts {totals.attempts}, lost {totals.lost_steps} steps ({duration(totals.lost_s)})",
        f"goodput {totals.goodput:.1%} of the {duration(totals.elapsed_s)} since the first attempt began: "
        + ", ".join(parts),
    ]


def _time(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S")
