"""Watches, off the training thread, for a wish that the attempt save and end.

Rank 0 looks for ``attempts/<id>/stop.json``: the storage is the only channel, so it works the same under Ray, torchrun
and a plain process. Every rank looks for a file on its own machine, by which an agent of the cloud tells that the
machine will be taken away.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

from trainer.events import EventKind, EventLog
from trainer.run_directory import RunDirectory, StopKind, StopRequest

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_TELL_S = 5.0
MOST_SECONDS = 366 * 86400.0
"""Nobody gives notice earlier; what is infinite, or near it, is no time for Ray."""


class StopSignal:
    """What was asked for, once it was."""

    def __init__(
        self, run: RunDirectory, attempt: str, rank: int, notice_file: str | None = None, node: str = ""
    ) -> None:
        """
        Args:
            node: what the driver calls this machine.
        """
        self._run = run
        self._attempt = attempt
        self._rank = rank
        self._notice_file = Path(notice_file) if notice_file else None
        self._node = node
        self._request: StopRequest | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="stop-signal")
        if rank == 0 or self._notice_file:
            self._thread.start()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_SECONDS):
            # Before anything is asked of the storage, or told there: that may take as long as there is.
            if self._request is None and self._notice_file is not None and is_there(self._notice_file):
                self._request = _of_file(self._notice_file)
                self._tell(self._request)
            with suppress(OSError):  # the storage is away for a moment; asking again costs nothing
                self._request = self._asked() or self._request

    def _asked(self) -> StopRequest | None:
        return self._run.stop_request(self._attempt) if self._rank == 0 else None

    def _tell(self, request: StopRequest) -> None:
        with suppress(OSError):  # for the driver, which then goes on elsewhere
            self._run.notify(self._attempt, self._rank, self._node, request)
        EventLog(self._run, self._attempt, self._rank).record(
            EventKind.NOTICE, request.reason, deadline=request.deadline
        )

    @property
    def requested(self) -> bool:
        return self._request is not None

    @property
    def seconds_left(self) -> float:
        """Until the deadline; infinite where none is known."""
        request = self._request
        if request is None or request.deadline is None:
            return float("inf")
        return max(0.0, request.deadline - time.time())

    def close(self) -> None:
        """Where a notice is being passed on to the driver, that is waited for a little: the next attempt would else be
        placed on the same machine."""
        self._closed.set()
        if self._thread.ident is not None:
            self._thread.join(_TELL_S)


def _of_file(notice: Path) -> StopRequest:
    return StopRequest(f"{notice} is there on {socket.gethostname()}", StopKind.PREEMPTED, deadline_in(notice))


def is_there(notice: Path) -> bool:
    """False also where it can't be seen, in a folder that this user may not enter: told once."""
    try:
        return notice.exists()
    except OSError as error:
        _warn_once(f"the notice file {notice} can't be looked for: {error}")
        return False


@cache
def _warn_once(text: str) -> None:
    log.warning("%s", text)


def deadline_in(path: Path) -> float | None:
    """Unix seconds, by the number of seconds left that a notice file begins with, from when it was written on; None
    where it holds none, or can't be read."""
    with suppress(OSError, ValueError, IndexError):
        seconds = float(path.read_text(errors="replace").split()[0])
        return path.stat().st_mtime + max(0.0, seconds) if seconds <= MOST_SECONDS else None
    return None
