"""Work done ahead, in background threads that live only while there is some."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from data_shards.errors import BatonError

Key = TypeVar("Key", bound=Hashable)


class Prefetcher(Generic[Key]):
    """Calls ``job`` once for each key, in the order in which they were added, in a few threads.

    An error ends the work; ``check`` raises it in whoever depends on it. Nobody ever waits for these threads.
    """

    def __init__(self, job: Callable[[Key], None], num_threads: int) -> None:
        self._job = job
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._waiting: OrderedDict[Key, None] = OrderedDict()
        self._running = 0
        self.failure: BaseException | None = None

    def add(self, keys: Iterable[Key]) -> None:
        """Raises what ``check`` raises."""
        self.check()
        with self._lock:
            self._waiting.update(dict.fromkeys(keys))
            missing = min(self._num_threads, len(self._waiting)) - self._running
            self._running += max(0, missing)
        for _ in range(missing):
            # A daemon, so that a process which ends does not wait for a download.
            threading.Thread(target=self._run, name="shard-prefetch", daemon=True).start()

    def check(self) -> None:
        """Raise what stopped the threads, if anything did."""
        if self.failure is None:
            return
        if isinstance(self.failure, (BatonError, OSError)):
            raise self.failure
        raise RuntimeError(f"the thread that reads shards ahead died: {self.failure!r}") from self.failure

    def _next(self) -> Key | None:
        with self._lock:
            if self._waiting and self.failure is None:
                return self._waiting.popitem(last=False)[0]
            self._running -= 1
            return None

    def _run(self) -> None:
        while (key := self._next()) is not None:
            try:
                self._job(key)
            except BaseException as error:  # whatever it is, it must reach the thread that trains
                self.failure = error
