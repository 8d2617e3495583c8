"""Which exit code a command should give when a file operation of it, or of its workers, was disturbed (pure)."""

from __future__ import annotations

import re
import signal

from data_shards.fault_points import Kind
from launch.exit_codes import ExitCode

_PROBE = re.compile(r"\.probe-")
"""Whether a new run's storage, and its nodes' own disks, can be written at all."""
_FOR_PEOPLE = re.compile(r"(?!read).* .*/(decision|quarantine|events/[^/]*)\.json$")
"""What is told where it can be: the run goes on without it."""
_READ = re.compile(r"read ")
"""What fails once is read again."""
_DURABLE_SAVE = re.compile(
    r"(create|write|sync|sync folder|rename|written) "
    r"(checkpoints/\d+-ID/(rank-.*|manifest\.json)|\d+-ID/receipts/.*|ID/steps/\d+-\d*[02468]\.jsonl)$"
)
"""Of every second step, and the step records that are written with it; the fast tier may fail."""
_COMMITTED = re.compile(r"(sync folder|written) .*/manifest\.json$")


def expected_codes(rank: int | None, point: str, kind: Kind, *, quarantined: bool) -> set[int]:
    """Of the submission in which the fault fires; ``rank`` None: in the driver.

    A disk that fails under a worker costs nothing but time: what failed is done again. Under the driver it ends the
    command, unless that was reading. A full disk stops resumably, as nothing may be removed where just one checkpoint
    is kept, but for one in quarantine.
    """
    if kind in (Kind.KILL, Kind.KILL_ALL):
        return {-signal.SIGKILL} if rank is None else {ExitCode.DONE}
    full = kind == Kind.ENOSPC
    if _PROBE.search(point):
        return {ExitCode.STOPPED if full and rank is None else ExitCode.BAD_INPUT}
    if rank is not None:
        if not full or quarantined or not _DURABLE_SAVE.match(point):
            return {ExitCode.DONE}
        # What a refused write had committed all the same makes the one before it removable, if there is one.
        return {ExitCode.DONE, ExitCode.STOPPED} if _COMMITTED.match(point) else {ExitCode.STOPPED}
    if _FOR_PEOPLE.match(point) or _READ.match(point):
        return {ExitCode.DONE}
    return {ExitCode.STOPPED} if full else {ExitCode.FAILED}
