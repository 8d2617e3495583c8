"""The driver's loop: start an attempt, see how it ended, ask the policy, act."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.attempt_end import end_of, newest_usable_of
from cluster.doing import Doing, DoingKind, write_doing
from cluster.failures import Action, AttemptEnd, Decision, EndKind, decide, decide_without_room
from cluster.launcher import WorkerLauncher
from cluster.lease import Lease
from cluster.run_metrics import RunState
from cluster.run_monitor import Monitor, NoMonitor
from trainer.checkpoint import CheckpointRef
from trainer.config import WorkerSpec
from trainer.events import EventKind, EventLog
from trainer.progress_log import duration
from trainer.run_directory import (
    AttemptStart,
    RunDirectory,
    Say,
    StopKind,
    StopRequest,
    utc_now,
    write_json,
)
from trainer.survey import NoUsableCheckpoint, tip_and_newest

log = logging.getLogger(__name__)

_AGAIN_S = 1.0
"""After which a wish that could not be written is written again; workers look as often."""


@dataclass(frozen=True)
class Submission:
    """The outcome of running the command once."""

    decision: Decision
    attempts: int
    """over the whole run, earlier submissions included"""
    checkpoint: CheckpointRef | None
    """the newest usable one"""


class _StopRequest:
    """Remembers a SIGTERM or SIGINT, or that the run was lost, and passes it on to the running attempt through the
    storage."""

    def __init__(self, run: RunDirectory, say: Say, grace_s: float | None) -> None:
        """
        Args:
            grace_s: seconds from a SIGTERM to the end of this process, where that is known.
        """
        self._run = run
        self._say = say
        self._grace_s = grace_s
        self._deadline: float | None = None
        self._reason = "the driver was asked to stop"
        self._latest: StopRequest | None = None
        self._writing = threading.Lock()
        self.wanted = False
        self.attempt: str | None = None
        """the last one that was started"""

    def handle(self, signum: int, _frame: Any) -> None:
        """Prints and writes nothing itself: it may interrupt code that holds the very locks that this needs."""
        first, self.wanted = not self.wanted, True
        if first:
            self._deadline = time.time() + self._grace_s if self._grace_s is not None else None
            line = f"{signal.Signals(signum).name}: asking the workers to save and stop"
            threading.Thread(target=self._say, args=(line,), daemon=True).start()
        self.forward()

    def lose(self) -> None:
        self._reason, self.wanted = "another launcher took the run over", True
        self.forward()
        self._say(f"{self._reason}: the workers stop")

    def ask(self, reason: str) -> None:
        self._reason, self.wanted = reason, True
        self.forward()
        self._say(f"{reason}: asking the workers to save and stop")

    def forward(self) -> None:
        if self.wanted:
            self._pass_on(StopRequest(self._reason, StopKind.STOP, self._deadline))

    def notice(self, request: StopRequest) -> None:
        """Of the launcher: the attempt should save and end. Where the run is to go on, that is no wish to stop it."""
        if request.kind == StopKind.STOP:
            self.wanted, self._reason, self._deadline = True, request.reason, request.deadline
        elif self.wanted:  # the run does not go on after it
            request = replace(request, kind=StopKind.STOP)
        self._pass_on(request)
        self._say(f"{request.reason}: asking the workers to save")

    def _pass_on(self, request: StopRequest) -> None:
        """On a thread of its own: neither a signal's handler nor the heartbeat may wait for the storage."""
        if self.attempt is not None:
            self._latest = request
            threading.Thread(target=self._write, args=(self.attempt, request), name="wish", daemon=True).start()

    def _write(self, attempt: str, request: StopRequest) -> None:
        """Until it is written, or is of no use any more."""
        told = False
        while True:
            with self._writing:  # else an earlier request could be written over a later one
                if self.attempt != attempt or self._latest is not request:
                    return
                try:
                    self._run.request_stop(attempt, request.reason, request.kind, request.deadline)
                    break
                except OSError as error:
                    if not told:
                        log.warning("the workers could not be asked to save, trying again until they are: %s", error)
                    told = True
            time.sleep(_AGAIN_S)
        EventLog(self._run, attempt).record(
            EventKind.NOTICE, request.reason, wish=request.kind.value, deadline=request.deadline
        )

    def wait(self, seconds: float) -> None:
        """Sleep, but not through a wish. Polled: an Event set in a signal handler could deadlock with its waiter."""
        deadline = time.monotonic() + seconds
        while not self.wanted and time.monotonic() < deadline:
            time.sleep(0.2)

    @contextmanager
    def listening(self) -> Iterator[None]:
        is_main = threading.current_thread() is threading.main_thread()
        signals = (signal.SIGTERM, signal.SIGINT) if is_main else ()
        before = {number: signal.signal(number, self.handle) for number in signals}
        try:
            yield
        finally:
            self.attempt = None
            for number, handler in before.items():
                signal.signal(number, handler)


def run_attempts(
    run: RunDirectory,
    launcher: WorkerLauncher,
    make_spec: Callable[[str, CheckpointRef | None], WorkerSpec],
    *,
    lease: Lease,
    max_failures_without_progress: int,
    stop_grace_s: float | None = None,
    monitor: Monitor | None = None,
    allowed_changes: tuple[str, ...] = (),
    say: Say = print,
) -> Submission:
    """Attempts until the policy ends it.

    Args:
        make_spec: the spec of an attempt, from its id and the checkpoint that it continues from.
        lease: of this launcher on the run; without it no attempt is started.
        stop_grace_s: seconds from a SIGTERM to the end of this process, where that is known.

    Raises RunHeld once the run is another launcher's; nothing is written about it then.
    """
    history: list[AttemptEnd] = []
    stop = _StopRequest(run, say, stop_grace_s)
    lease.when_lost(stop.lose)
    lease.when_asked_to_stop(stop.ask)
    monitor = monitor or NoMonitor()
    with stop.listening():
        while True:
            monitor.set_state(RunState.WAITING)
            num_workers, waited = _wait_for_room(run, launcher, lease, stop, say)
            stop_wanted = stop.wanted  # before the check: the loss of the run is such a wish, too
            lease.check()
            try:  # only now: while this one waited, workers that it took the run from may have committed, and removed
                goes_on = num_workers > 0 and not stop_wanted
                parent, resume_from = _ask_then_look(run, say) if goes_on else tip_and_newest(run, say)
            except NoUsableCheckpoint as error:
                return Submission(Decision(Action.FAIL, str(error)), len(run.lineage()), None)
            if not goes_on:
                step = resume_from.step if resume_from else 0
                decision = decide_without_room(step, stop_wanted=stop_wanted)
                return Submission(decision, parent.number if parent else 0, resume_from)
            start = _start(run, lease, parent, resume_from, allowed_changes, num_workers, say)
            if waited:
                EventLog(run, start.attempt).record(EventKind.WAITING, waited)
            monitor.attempt_started(start.number)
            stop.attempt = start.attempt
            stop.forward()
            spec = make_spec(start.attempt, resume_from)
            lost = launcher.run(spec, num_workers, stop.notice)
            lease.check()
            for node, request in run.notices(start.attempt).items():
                launcher.leave(node, request)
            end = end_of(run, start, spec, lost, say)
            history.append(end)
            decision = decide(history, max_failures_without_progress, stop_wanted=stop.wanted)
            _record_end(run, start.attempt, end, decision)
            if decision.action != Action.RETRY:
                return Submission(decision, start.number, newest_usable_of(run))
            monitor.set_state(RunState.WAITING)
            _tell_retry(start, end, decision, say)
            stop.wait(decision.delay_s)


def _wait_for_room(
    run: RunDirectory, launcher: WorkerLauncher, lease: Lease, stop: _StopRequest, say: Say
) -> tuple[int, str]:
    """For how many workers there is room; and how long what was waited for, nothing where it took but a moment."""
    since, told = time.time(), ""

    def tell(line: str) -> None:
        nonlocal told
        told = line
        say(line)
        write_doing(run, Doing(DoingKind.WAITING, since, line, lease.id, after=stop.attempt))

    num_workers = launcher.wait_for_room(lambda: stop.wanted, tell)
    return num_workers, f"{duration(time.time() - since)} {told}" if told else ""


def _start(
    run: RunDirectory,
    lease: Lease,
    parent: AttemptStart | None,
    resume_from: CheckpointRef | None,
    allowed_changes: tuple[str, ...],
    num_workers: int,
    say: Say,
) -> AttemptStart:
    """From here on the attempt counts, and is told."""
    start = run.start_attempt(
        parent, resume_from, allowed_changes, term=lease.term, claim=lease.id, num_workers=num_workers
    )
    where = f"resuming from step {resume_from.step}" if resume_from else "from the beginning"
    say(f"attempt {start.number} ({start.attempt}): {where}, {num_workers} workers")
    details = {"number": start.number, "step": start.start_step, "num_workers": num_workers}
    EventLog(run, start.attempt).record(EventKind.STARTED, where, **details)
    return start


def _tell_retry(start: AttemptStart, end: AttemptEnd, decision: Decision, say: Say) -> None:
    ended = "failed" if end.kind == EndKind.FAILED else "has made way"
    say(f"attempt {start.number} {ended} ({decision.reason}); the next one starts in {decision.delay_s:.0f}s")


def _record_end(run: RunDirectory, attempt: str, end: AttemptEnd, decision: Decision) -> None:
    record = {"decision": asdict(decision), "end": asdict(end), "at": utc_now()}
    with suppress(OSError):  # for people; a full disk must not change what follows
        write_json(run.attempt(attempt), "decision.json", record)
    EventLog(run, attempt).record(EventKind.ENDED, decision.reason, end=end.kind.value, step=end.committed_step)


def _ask_then_look(run: RunDirectory, say: Say) -> tuple[AttemptStart | None, CheckpointRef | None]:
    """As ``tip_and_newest``, of an attempt that was asked to end before the look: its workers may have outlived their
    launcher, and from then on they remove nothing of what is found (``retention.prune``)."""
    chain = run.lineage()
    while True:
        if chain:
            run.request_stop(chain[-1].attempt, "the run goes on in another attempt", StopKind.SUPERSEDED)
        parent, newest = tip_and_newest(run, say)
        if parent == (chain[-1] if chain else None):
            return parent, newest
        chain = run.lineage()
