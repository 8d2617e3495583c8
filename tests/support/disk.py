"""Real file systems: one of a given size, to get full; one whose files this machine's memory can hold wrongly."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk_of(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Mounted on a new folder; the test is skipped where this user may not."""
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={size_bytes}", "none"):
        yield folder


@contextmanager
def disk_in_a_file(folder: Path, size_bytes: int) -> Iterator[Path]:
    """An ext4 in a file beside a new folder, mounted there; the test is skipped where this user may not."""
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("no mkfs.ext4 here")
    image = _image_of(folder)
    image.touch()
    os.truncate(image, size_bytes)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-O", "^has_journal", str(image)], check=True)
    with _mounted(folder, "-o", "loop", str(image)):
        yield folder


@contextmanager
def _mounted(folder: Path, *what: str) -> Iterator[None]:
    folder.mkdir()
    done = subprocess.run(["mount", *what, str(folder)], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"this user may not mount: {done.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _image_of(disk: Path) -> Path:
    return disk.with_suffix(".img")


_PAGE_BYTES = 4096


def remember_wrongly(disk: Path, path: Path, page: int) -> None:
    """Let this machine's memory hold a wrong bit of a file that is good on its disk, one of ``disk_in_a_file``."""
    start = page * _PAGE_BYTES
    with path.open("r+b") as file:
        file.seek(start)
        good = file.read(_PAGE_BYTES)
        bad = bytes([good[0] ^ 1]) + good[1:]
        file.seek(start)
        file.write(bad)
        file.flush()
        os.fsync(file.fileno())
    with _image_of(disk).open("r+b") as image:  # under the mounted file system, which does not notice
        contents = image.read()
        assert contents.count(bad) == 1
        image.seek(contents.index(bad))
        image.write(good)
        image.flush()
        os.fsync(image.fileno())
    assert path.read_bytes()[start : start + _PAGE_BYTES] == bad


def resize(disk: Path, size_bytes: int) -> None:
    """What lies on it stays."""
    subprocess.run(["mount", "-o", f"remount,size={size_bytes}", str(disk)], check=True)
