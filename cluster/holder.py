"""Which process holds a run, and whether a process of this machine is still there."""

from __future__ import annotations

import getpass
import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
_GONE, _STOPPED = "ZX", "Tt"
"""States of a process, proc(5): ended but not reaped; suspended."""


class Life(StrEnum):
    ALIVE = "alive"
    DEAD = "dead"
    UNSURE = "unsure"


@dataclass(frozen=True)
class Holder:
    host: str
    user: str
    pid: int
    started: int | None
    """clock ticks since boot, so that a pid which was given to another process is told apart; None: not known"""
    place: str | None
    """boot id and pid namespace: where this is the same, ``pid`` means the same process. None: not known"""
    job: str | None
    """Ray's submission id"""

    def __str__(self) -> str:
        job = f", Ray job {self.job}" if self.job else ""
        return f"{self.user}@{self.host}, pid {self.pid}{job}"


def this_process() -> Holder:
    return process(os.getpid())


def process(pid: int) -> Holder:
    """One of this machine."""
    stat = _stat(pid)
    return Holder(platform.node(), _user(), pid, stat[1] if stat else None, _place(), _ray_job())


def life_here(holder: Holder) -> Life:
    """UNSURE where it runs elsewhere, is suspended, or can't be seen: then only its heartbeat tells."""
    if holder.place is None or holder.started is None or holder.place != _place():
        return Life.UNSURE
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return Life.DEAD
    except PermissionError:
        pass  # somebody else's, but it is there
    stat = _stat(holder.pid)
    if stat is None:  # other users' processes may be hidden (hidepid), or it ended this moment
        return Life.UNSURE
    state, started = stat
    if state in _GONE or started != holder.started:
        return Life.DEAD
    return Life.UNSURE if state in _STOPPED else Life.ALIVE


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start time (fields 3 and 22 of /proc/<pid>/stat); the name before them may hold anything."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _place() -> str | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 - no path but "pid:[…]"
    except OSError:
        return None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's uid need not have a name
        return str(os.getuid())


def _ray_job() -> str | None:
    with suppress(ValueError, AttributeError):
        return json.loads(os.environ.get(_RAY_JOB, "{}")).get("metadata", {}).get("job_submission_id")
    return None
