"""Nodes with disks of their own, on one machine: mount namespaces in which one path shows another folder in each."""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

_CLONE_NEWNS = 0x00020000


def skip_unless_allowed() -> None:
    done = subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"this user may not make mount namespaces: {done.stderr.decode()}")


def become_node(disk: Path, shown_at: Path) -> None:
    """From now on this process, and the threads that it starts, see ``disk`` at ``shown_at``; nobody else does."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "unshare")
    disk.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "--bind", str(disk), str(shown_at)], check=True)
