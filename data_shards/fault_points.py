"""Places in ``Storage`` at which a test lets this process die, or its disk fail. Idle unless ``BATON_FAULTS`` is set.

``BATON_FAULTS`` is JSON: ``{"trace": FILE}`` appends each place that is reached to a file; ``{"rank": R, "point": P,
"kind": K, "mark": FILE}`` lets K happen where a process of rank R (null: the driver) first reaches P, once in all: MARK
tells that it did.
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{12,}(?![0-9a-f])")
"""Of an attempt, a claim: another in each run."""


class Kind(StrEnum):
    KILL = "kill"
    KILL_ALL = "kill all"
    """this process and every other worker of its attempt that has reached any point"""
    EIO = "EIO"
    ENOSPC = "ENOSPC"
    EROFS = "EROFS"


def reach(operation: str, path: str | os.PathLike[str]) -> None:
    """Called before and after each operation on a file. Raises OSError where that is what is to happen."""
    if "BATON_FAULTS" in os.environ:
        _reach(json.loads(os.environ["BATON_FAULTS"]), operation, str(path))


def _reach(plan: dict[str, Any], operation: str, path: str) -> None:
    rank = os.environ.get("RANK")
    point = f"{operation} {_ID.sub('ID', '/'.join(path.split('/')[-3:]))}"
    if "trace" in plan:
        with Path(plan["trace"]).open("a") as file:  # one short line is one write
            file.write(json.dumps([None if rank is None else int(rank), point]) + "\n")
        return
    pids = Path(plan["mark"]).with_suffix(".pids")
    _register(pids, os.getpid())
    if plan["point"] != point or str(plan["rank"]) != str(rank) or Path(plan["mark"]).exists():
        return
    Path(plan["mark"]).write_text(point)
    match Kind(plan["kind"]):
        case Kind.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Kind.KILL_ALL:
            for pid in [int(pid) for pid in pids.read_text().split() if int(pid) != os.getpid()]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            os.kill(os.getpid(), signal.SIGKILL)
        case kind:
            number = getattr(errno, kind.value)
            raise OSError(number, os.strerror(number), path)


@cache
def _register(pids: Path, pid: int) -> None:
    """Once a process: a worker may be a fork of one that has been here."""
    if "RANK" in os.environ:
        with pids.open("a") as file:
            file.write(f"{pid}\n")
