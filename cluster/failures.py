"""What to do when an attempt ends (pure). One place acts on it: ``cluster.attempts``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from trainer.errors import OutOfMemory
from trainer.hang import Hang
from trainer.run_directory import WorkerError

MOST_SAME_FAILURES = 3
"""at one step, with nothing committed in between"""
_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")
_OF_A_PEER = re.compile(r"/gloo/|\bNCCL\b|ProcessGroup|[Cc]onnection (?:closed|reset) by (?:remote )?peer")
"""What a collective says where another rank has gone: its end is the cause, not this."""


class EndKind(StrEnum):
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended, as the driver sees it."""

    kind: EndKind
    start_step: int
    committed_step: int
    """newest usable commit after it"""
    error: WorkerError | None = None
    lost_workers: str = ""
    """what the launcher saw: signals and exit codes"""
    making_way: str = ""
    """why it was to end, where the run is to go on: a machine that will be taken away, room for more workers"""
    ended_early: str = ""
    """why the run is finished, where steps are left to do"""


ALL_STEPS_DONE = "all steps are done"


class Action(StrEnum):
    FINISH = "finished"
    RETRY = "retry"
    STOP_RESUMABLE = "stopped"
    FAIL = "failed"
    BAD_INPUT = "bad_input"


@dataclass(frozen=True)
class Decision:
    action: Action
    reason: str
    delay_s: float = 0.0


def root_cause(errors: Sequence[WorkerError]) -> WorkerError | None:
    """The error that explains the rest: one raised on purpose, or by chance, before the collective errors that it
    caused elsewhere, a hang that names ranks before one that does not; and before it, what those ranks themselves
    left."""

    def order(e: WorkerError) -> tuple[object, ...]:
        is_hang = e.type == Hang.__name__
        special = (not e.disk_full, e.checkpoint is None, not e.corrupt, not e.recurs, not e.suspects, not is_hang)
        # Of those that no attempt can help, what may be just a bad read comes last.
        doubtful = e.data_file is not None
        return (not e.bad_input, e.retryable, doubtful, *special, _OF_A_PEER.search(e.message) is not None, e.rank)

    first = min(errors, key=order, default=None)
    if first is not None and first.suspects:
        theirs = [e for e in errors if e.rank in first.suspects and e.type != Hang.__name__]
        return root_cause(theirs) or first
    return first


def misread(error: WorkerError, message: str, place: str) -> WorkerError:
    """What is left of a worker's finding that a file is corrupt where from elsewhere it is not: the attempt alone has
    failed, and counts as one that did. The same node may read it badly again and again.

    Args:
        place: where that worker ran, in words.
    """
    told = f"{message}; look at {place}"
    return replace(error, message=told, retryable=True, checkpoint=None, corrupt=False, data_file=None)


def _cause(end: AttemptEnd) -> str:
    """The reason in words; where workers were lost, their end explains the errors that the others saw."""
    error = f"{end.error.type}: {end.error.message}" if end.error else ""
    return "; ".join(filter(None, [error, end.lost_workers])) or "the workers vanished"


def _stopped_on_request(committed_step: int) -> Decision:
    return Decision(Action.STOP_RESUMABLE, f"stopped on request; step {committed_step} is saved")


def decide_without_room(committed_step: int, *, stop_wanted: bool) -> Decision:
    """What follows when the workers could not be placed: nothing was tried, so nothing failed."""
    if stop_wanted:
        return _stopped_on_request(committed_step)
    return Decision(
        Action.STOP_RESUMABLE,
        f"the cluster had no room for the workers in time (cluster.wait_for_room_s); step {committed_step} is saved",
    )


def _num_barren(history: Sequence[AttemptEnd]) -> int:
    """Attempts since one committed beyond everything before it: not just beyond its own start, as what it commits may
    be lost with a node again and again. One that found a checkpoint unusable does not count: it is not used again. Nor
    does one whose end others wished: machines may be taken away faster than anything is committed.
    """
    barren, reached = 0, history[0].start_step
    for end in history:
        if end.committed_step > reached:
            barren, reached = 0, end.committed_step
        elif not (end.error and end.error.checkpoint) and not end.making_way:
            barren += 1
    return barren


def _is_same(one: WorkerError | None, other: WorkerError) -> bool:
    """Of the same kind, at the same step, with the same words: numbers in them (ports, addresses, seconds) differ."""
    if one is None or (one.type, one.step) != (other.type, other.step):
        return False
    return _NUMBERS.sub("#", one.message) == _NUMBERS.sub("#", other.message)


def _places_of_errors(history: Sequence[AttemptEnd]) -> set[tuple[str, int | None]]:
    return {(end.error.type, end.error.step) for end in history if end.error}


def _crash_loop(history: Sequence[AttemptEnd]) -> str:
    """Why going on would be a crash loop, in words; nothing where it would not.

    An error that recurs is one once it has come twice at its step; others once they have come several times in a row
    with nothing committed in between. Before the first step nothing tells errors of the machines from others.
    """
    last = history[-1].error
    if last is None or last.step is None:
        return ""
    if last.recurs and (last.type, last.step) in _places_of_errors(history[:-1]):
        return f"a crash loop: step {last.step} failed in the same way after going back, so no machine is at fault"
    times = 0
    for end in reversed(history):
        if not _is_same(end.error, last):
            break
        times += 1
        if end.committed_step > end.start_step:  # what came before was another place
            break
    if times >= MOST_SAME_FAILURES:
        return f"a crash loop: step {last.step} failed {times} times in a row in the same way"
    return ""


def _is_of_a_machine(history: Sequence[AttemptEnd]) -> bool:
    """Whether what the last attempt refused before its first step, or had no memory for, was good for one before it:
    then it is a machine that came since and lacks a mount, a base or a GPU's driver, or whose memory others hold."""
    error, begun_at = history[-1].error, history[-1].start_step
    if error is None or begun_at <= history[0].start_step:
        return False
    if error.type == OutOfMemory.__name__:  # fewer workers, each of which holds more, may lack it, too: then it recurs
        return (error.type, error.step) not in _places_of_errors(history[:-1])
    return error.bad_input and error.step is None


def decide(history: Sequence[AttemptEnd], max_failures_without_progress: int, *, stop_wanted: bool) -> Decision:
    """What follows the last of these attempts of one submission.

    A failure after progress starts the count anew, so a long run on spot nodes may fail any number of times; failing at
    the same place again and again ends it, in the same way sooner.
    """
    last = history[-1]
    if last.kind == EndKind.FINISHED:
        return Decision(Action.FINISH, last.ended_early or ALL_STEPS_DONE)
    stopped = _stopped_on_request(last.committed_step)
    if last.kind == EndKind.STOPPED and stop_wanted:
        return stopped
    if last.kind == EndKind.STOPPED and last.making_way:
        return Decision(Action.RETRY, last.making_way)
    cause = _cause(last) if last.kind == EndKind.FAILED else "its workers saved and stopped, and could not tell why"
    if last.error and last.error.disk_full:
        return Decision(Action.STOP_RESUMABLE, cause)
    if last.error and not (last.error.retryable or _is_of_a_machine(history)):
        return Decision(Action.BAD_INPUT if last.error.bad_input else Action.FAIL, cause)
    if stop_wanted:
        return stopped
    if loop := _crash_loop(history):
        return Decision(Action.FAIL, f"{loop}: {cause}")
    barren = _num_barren(history)
    if barren > max_failures_without_progress:
        return Decision(
            Action.FAIL,
            f"{barren} attempts in a row failed without committing anything new (cluster.max_failures_without_progress="
            f"{max_failures_without_progress}); the last: {cause}",
        )
    return Decision(Action.RETRY, cause, delay_s=min(60.0, 2.0 ** (barren - 1) - 1 if barren else 0.0))
