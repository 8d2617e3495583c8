"""Rank 0 watches the attempt's folder for a wish to stop, off the training thread."""

from __future__ import annotations

import threading

from trainer.run_directory import RunDirectory

POLL_SECONDS = 1.0


class StopSignal:
    """A flag that turns true once ``attempts/<id>/stop.json`` exists. The storage is the only channel, so it works the
    same under Ray, torchrun and a plain process."""

    def __init__(self, run: RunDirectory, attempt: str, *, watch: bool) -> None:
        self._wanted = threading.Event()
        self._closed = threading.Event()
        if watch:
            threading.Thread(target=self._watch, args=(run, attempt), daemon=True, name="stop-signal").start()

    def _watch(self, run: RunDirectory, attempt: str) -> None:
        while not self._closed.wait(POLL_SECONDS):
            try:
                if run.stop_requested(attempt):
                    self._wanted.set()
                    return
            except OSError:
                continue  # the storage is away for a moment; asking again costs nothing

    @property
    def requested(self) -> bool:
        return self._wanted.is_set()

    def close(self) -> None:
        self._closed.set()
