"""Launchers as threads of which one runs at a time, over a storage in memory, by a clock that only the test moves.

Whenever one is about to touch the storage or to sleep, the test chooses who goes on: so every order of their reads and
writes can come about, and any of them can be suspended or end at any point.
"""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Callable, Iterable
from typing import Any
from unittest import mock

from data_shards.storage import BlockHasher, FileEntry


class Ended(BaseException):
    """As SIGKILL: nothing that the launcher would do on its way out reaches the storage."""


class Launcher:
    def __init__(self, stage: Stage, body: Callable[[Launcher], None]) -> None:
        self._stage = stage
        self._body = body
        self._turn = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.wakes_at = 0.0
        self.killed = False
        self.done = False
        self.error: BaseException | None = None
        self._thread.start()

    def _run(self) -> None:
        self._turn.acquire()
        try:
            self._body(self)
        except BaseException as error:
            self.error = None if isinstance(error, Ended) else error
        self.done = True
        self._stage.back.release()

    def pause(self) -> None:
        """Called by the launcher's own thread, before each thing that others may come before."""
        if not self.killed:
            self._stage.back.release()
            self._turn.acquire()
        if self.killed:
            raise Ended

    def sleep(self, seconds: float) -> None:
        self.wakes_at = self._stage.clock + seconds
        self.pause()

    def step(self) -> None:
        """Called by the test: up to the next pause."""
        self._turn.release()
        self._stage.back.acquire()


class Stage:
    """The clock, the files, and whose turn it is."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.back = threading.Semaphore(0)
        self.files: dict[str, bytes] = {}
        self.written: list[str] = []
        """paths, in the order in which they were written"""
        self.launchers: list[Launcher] = []

    def add(self, body: Callable[[Launcher], None]) -> None:
        self.launchers.append(Launcher(self, body))

    def play(self, chance: random.Random, *, kill: float = 0.0, suspend: float = 0.0, longest_s: float = 0.0) -> None:
        """Until all have ended.

        Args:
            kill, suspend: shares of the turns at which that happens instead; the last launcher is not killed, and
                suspended ones sleep up to ``longest_s``.
        """
        with mock.patch("uuid.uuid4", lambda: uuid.UUID(int=chance.getrandbits(128), version=4)):
            self._play(chance, kill, suspend, longest_s)
        assert all(launcher.done for launcher in self.launchers), "they wait for each other"
        for launcher in self.launchers:
            if launcher.error is not None:
                raise launcher.error

    def _play(self, chance: random.Random, kill: float, suspend: float, longest_s: float) -> None:
        for _ in range(20_000):
            there = [launcher for launcher in self.launchers if not launcher.done]
            if not there:
                break
            ready = [launcher for launcher in there if launcher.wakes_at <= self.clock]
            if not ready:
                self.clock = min(launcher.wakes_at for launcher in there)
                continue
            launcher = chance.choice(ready)
            fate = chance.random()
            if kill <= fate < kill + suspend:
                launcher.wakes_at = self.clock + chance.uniform(0, longest_s)
                continue
            launcher.killed = fate < kill and sum(not other.killed for other in self.launchers) > 1
            launcher.step()


class MemoryStorage:
    """What the tests need of a Storage, as one launcher sees it. ``launcher`` None: the test itself looks."""

    local_path = None

    def __init__(self, stage: Stage, launcher: Launcher | None, base: str = "") -> None:
        self._stage, self._launcher, self._base = stage, launcher, base
        self.uri = f"memory:{base}"

    def _at(self, relative: str) -> str:
        if self._launcher is not None:
            self._launcher.pause()
        return f"{self._base}{relative}"

    def child(self, relative: str) -> MemoryStorage:
        return MemoryStorage(self._stage, self._launcher, f"{self._base}{relative}/")

    def uri_of(self, relative: str) -> str:
        return f"{self.uri}{relative}"

    def list(self, relative: str = "") -> list[str]:
        base = self._at(f"{relative}/" if relative else "")
        return sorted({path[len(base) :].split("/")[0] for path in self._stage.files if path.startswith(base)})

    def read(self, relative: str) -> bytes:
        path = self._at(relative)
        if path not in self._stage.files:
            raise FileNotFoundError(path)
        return self._stage.files[path]

    def size(self, relative: str) -> int | None:
        data = self._stage.files.get(self._at(relative))
        return None if data is None else len(data)

    def exists(self, relative: str) -> bool:
        return self.size(relative) is not None

    def sizes(self, relative: str = "") -> dict[str, int]:
        base = self._at(f"{relative}/" if relative else "")
        found = {path[len(base) :]: data for path, data in self._stage.files.items() if path.startswith(base)}
        return {name: len(data) for name, data in found.items() if "/" not in name}

    def write(self, relative: str, chunks: Iterable[Any]) -> FileEntry:
        data = b"".join(chunks)
        path = self._at(relative)
        self._stage.files[path] = data
        self._stage.written.append(path)
        hasher = BlockHasher()
        hasher.update(memoryview(data))
        return FileEntry(relative, hasher.size, hasher.digests())

    def delete_file(self, relative: str) -> None:
        path = self._at(relative)
        if path not in self._stage.files:
            raise FileNotFoundError(path)
        del self._stage.files[path]

    def delete_tree(self, relative: str) -> None:
        """A file at a time, as object stores do; others may come between."""
        base = f"{self._base}{relative}/"
        for path in [path for path in self._stage.files if path.startswith(base)]:
            self._at("")
            self._stage.files.pop(path, None)
