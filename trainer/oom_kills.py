"""Processes that the kernel killed for want of host memory, as the cgroup of this process counts them.

To whoever waits for a process, such a SIGKILL looks like any other.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def count(membership: str | None = None, root: Path = _CGROUPS) -> int | None:
    """So far; None where that can't be told.

    Args:
        membership: ``/proc/self/cgroup``: lines ``id:controllers:path``, of version 2 ``0::path``
            (man 7 cgroups; Documentation/admin-guide/cgroup-v2.rst, memory.events).
    """
    with suppress(OSError):
        lines = (Path("/proc/self/cgroup").read_text() if membership is None else membership).splitlines()
        for file in _candidates(lines, root):
            with suppress(OSError):
                if found := _COUNT.search(file.read_text()):
                    return int(found[1])
    return None


def _candidates(lines: list[str], root: Path) -> list[Path]:
    """A container may see its own group as the root."""
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            found += [root / "memory" / inner / "memory.oom_control" for inner in (path.lstrip("/"), "")]
        elif not controllers:
            found += [root / inner / "memory.events" for inner in (path.lstrip("/"), "")]
    return found


def told(before: int | None) -> str:
    """What has happened since then, in words; nothing where nothing has, or nobody can tell."""
    now = count()
    if before is None or now is None or now <= before:
        return ""
    return (
        f"meanwhile the kernel killed {now - before} of the processes here for want of host memory (cgroup oom_kill): "
        "give the container or the node more of it, or use fewer workers a node"
    )
