"""Ends this process when it hangs, and says who holds whom up: the attempt then fails, and is begun again.

A thread of Python looks at the training thread's pulse. Where a thread holds the interpreter's lock it can't; so a
thread of C (``faulthandler``) stands behind it, which writes the stacks and ends the process a little later. A process
that is stopped does neither: the others, who wait for it, name it, and whoever started it ends it.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from data_shards.errors import BatonError
from data_shards.storage import Storage
from trainer.config import WatchdogConfig
from trainer.events import EventKind, EventLog
from trainer.hang import Hang, HangReport, Verdict, message, read_reports, verdict, write_report
from trainer.progress_log import ProgressLog
from trainer.pulse import Phase, Pulse
from trainer.run_directory import RunDirectory, WorkerError

EXIT_CODE = 70
"""Of a process that hung (EX_SOFTWARE of sysexits.h)"""
_LONGEST_POLL_S = 0.5
_REPORTS_WITHIN_S = 8.0
"""ranks notice a hang within moments of each other; one that has not reported by then does not"""
_SECOND_LINE_S = 10.0
"""after the first: what it finds must be in the file before the ranks that noticed end, and the rest are killed"""
_LINGER_S = 13.0
_LAST_RESORT_S = 60.0
"""to end the process whatever happens to its report: the storage may be what hangs"""
_STDERR = 2


class Watch(Protocol):
    def close(self) -> None:
        """Called when the worker ends by itself, well or not; it is not ended any more then. Where it is being ended,
        does not return: what it would tell is what the hang, or the end of another rank, led to."""
        ...


class NoWatch:
    def close(self) -> None:
        return None


def limit_s(config: WatchdogConfig, phase: Phase, step_seconds: Sequence[float], ending_s: float) -> float:
    """How long there may be no progress (pure).

    Args:
        step_seconds: of the attempt's last steps, oldest first.
        ending_s: how long the last save may take.
    """
    if phase == Phase.ENDING:
        return ending_s + config.at_least_s
    if not step_seconds:
        return config.first_step_s
    return max(config.at_least_s, config.factor * statistics.median(step_seconds))


class Watchdog:
    def __init__(
        self, config: WatchdogConfig, run: RunDirectory, attempt: str, pulse: Pulse, *, rank: int, ending_s: float
    ) -> None:
        """Args: ending_s: how long the last save may take."""
        self._config = config
        self._run = run
        self._id = attempt
        self._attempt = run.attempt(attempt)
        self._pulse = pulse
        self._rank = rank
        self._world_size = int(os.environ.get("WORLD_SIZE", "1"))
        self._ending_s = ending_s
        self._closed = threading.Event()
        self._arming = threading.Lock()
        self._stacks = _StacksFile(self._attempt, f"stacks/rank-{rank:05d}.txt")
        self._ending = False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self._arming:
            if not self._ending and not self._closed.is_set():
                self._closed.set()
                faulthandler.cancel_dump_traceback_later()
                self._stacks.close()
        if self._ending:
            self._thread.join()

    def _watch(self) -> None:
        seen = -1.0
        while True:
            beat_at = self._pulse.beat_at
            limit = limit_s(self._config, self._pulse.phase, list(self._pulse.step_seconds), self._ending_s)
            left = beat_at + limit - time.monotonic()
            if beat_at != seen:
                seen = beat_at  # here, not with each beat: the thread of C is made anew each time
                self._arm(left + _SECOND_LINE_S)
            if left < 0 and beat_at == self._pulse.beat_at and self._may_end():
                self._end(limit)
            if self._closed.wait(min(_LONGEST_POLL_S, limit / 20)):
                return

    def _arm(self, seconds: float) -> None:
        with self._arming:
            if not self._closed.is_set():
                self._stacks.dump_after(max(0.001, seconds))

    def _may_end(self) -> bool:
        """From then on the worker can't end by itself."""
        with self._arming:
            self._ending = not self._closed.is_set()
            faulthandler.cancel_dump_traceback_later()
        return self._ending

    def _end(self, limit: float) -> None:
        """Does not return."""
        try:
            threading.Thread(target=_end_process_after, args=(_LAST_RESORT_S,), daemon=True).start()
            noticed = time.monotonic()
            mine = self._report(limit)
            ProgressLog.warn(f"rank {self._rank}: no progress for {mine.silent_s:.0f} s; ending this attempt")
            with suppress(OSError, BatonError):
                self._stacks.dump()
            with suppress(OSError, BatonError):
                write_report(self._attempt, mine)
            reports, found = self._hear_others(mine, noticed)
            self._tell(mine, reports, found)
            if found.missing:  # the second line of those that can't report is still to come
                time.sleep(max(0.0, noticed + _LINGER_S - time.monotonic()))
        finally:
            os._exit(EXIT_CODE)  # a thread that is in a collective can't be interrupted otherwise

    def _report(self, limit: float) -> HangReport:
        pulse = self._pulse
        steps = list(pulse.step_seconds)
        return HangReport(
            rank=self._rank,
            node=socket.gethostname(),
            step=pulse.step,
            phase=pulse.phase.value,
            num_entered=pulse.num_entered,
            collectives=_collectives_started(),
            silent_s=time.monotonic() - pulse.beat_at,
            usual_s=statistics.median(steps) if steps else None,
            limit_s=limit,
        )

    def _hear_others(self, mine: HangReport, noticed: float) -> tuple[dict[int, HangReport], Verdict]:
        reports = {self._rank: mine}
        while True:
            with suppress(OSError, BatonError):
                reports |= read_reports(self._attempt)
            found = verdict(reports, self._world_size)
            if not found.missing or time.monotonic() > noticed + _REPORTS_WITHIN_S:
                return reports, found
            time.sleep(0.2)

    def _tell(self, mine: HangReport, reports: dict[int, HangReport], found: Verdict) -> None:
        text = message(mine, found, reports, self._attempt.uri_of("stacks"))
        error = WorkerError.of(self._rank, Hang(text), step=mine.step, suspects=found.suspects)
        with suppress(OSError, BatonError):
            self._run.write_error(self._id, error)
        ProgressLog.warn(f"rank {self._rank}: {text}")
        if self._rank == min(reports):
            details = {"step": mine.step, "phase": mine.phase, "missing": found.missing, "behind": found.behind}
            EventLog(self._run, self._id, self._rank).record(EventKind.HANG, text, **details)


class _StacksFile:
    """Takes the stacks of all threads, also from C: so it is open from the start. On an object store C has none to
    write to, and writes to standard error."""

    def __init__(self, attempt: Storage, name: str) -> None:
        self._attempt = attempt
        self._name = name
        self._path: Path | None = attempt.local_path / name if attempt.local_path is not None else None
        self._descriptor = _STDERR
        if self._path is not None:
            with suppress(OSError):  # a full disk: standard error has to do
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def dump_after(self, seconds: float) -> None:
        """Have the stacks written by then, and the process ended, unless this is called again before."""
        faulthandler.dump_traceback_later(seconds, file=self._descriptor, exit=True)

    def dump(self) -> None:
        if self._path is not None:
            faulthandler.dump_traceback(self._descriptor, all_threads=True)
            return
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            self._attempt.write(self._name, [file.read()])

    def close(self) -> None:
        """Leaves nothing where nothing was written."""
        if self._descriptor == _STDERR or self._path is None:
            return
        descriptor, self._descriptor = self._descriptor, _STDERR
        empty = os.fstat(descriptor).st_size == 0
        os.close(descriptor)
        if empty:
            with suppress(OSError):
                self._path.unlink()
                self._path.parent.rmdir()  # by the last rank; until then it is not empty


def _end_process_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(EXIT_CODE)


def _collectives_started() -> int | None:
    """In all process groups; None where they don't count."""
    from torch.distributed import distributed_c10d

    try:
        groups: list[Any] = list(distributed_c10d._world.pg_map)
        return sum(group._get_sequence_number_for_group() for group in groups)
    except (AttributeError, RuntimeError):
        return None


def open_watch(
    config: WatchdogConfig, run: RunDirectory, attempt: str, pulse: Pulse, *, rank: int, commit_timeout_s: float
) -> Watch:
    """Args: commit_timeout_s: of a save; at the end two are waited for at most, and then retention."""
    if not config.enabled:
        return NoWatch()
    return Watchdog(config, run, attempt, pulse, rank=rank, ending_s=5 * commit_timeout_s)
