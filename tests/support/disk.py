"""A real file system of a given size, to get full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk_of(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mounted on a new folder; the test is skipped where this user may not."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(folder)], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip(f"this user may not mount a tmpfs: {done.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def resize(disk: Path, size_bytes: int) -> None:
    """What lies on it stays."""
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", str(disk)], check=True)
