"""Looks, while an attempt runs on Ray, for what it should make way for: its machines going, more of them coming."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster import ray_nodes
from cluster.config import WorkerBounds
from trainer.events import EventKind, read_events
from trainer.run_directory import RunDirectory, StopKind, StopRequest
from trainer.stop_signal import deadline_in, is_there

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
_GROW_LOOKS = 3
"""In a row that must find room before an attempt makes way: what is free may be about to be taken by others."""


@dataclass
class Watch:
    """Over one attempt."""

    run: RunDirectory
    attempt: str
    num_workers: int
    bounds: WorkerBounds | None
    room_for_more: Callable[[int], int]
    """how many workers could be placed beside so many"""
    notify: Callable[[StopRequest], None]
    here: str
    """the driver's node: where it goes, the driver goes, and nobody is left to begin the next attempt"""
    notice_file: str | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        closed = threading.Event()
        thread = threading.Thread(target=self._watch, args=(closed,), name="cluster-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            closed.set()
            thread.join(10 * POLL_SECONDS)

    def _watch(self, closed: threading.Event) -> None:
        nodes: Mapping[int, str] = {}
        trains_since: float | None = None
        looks_with_room = 0
        making_way = False
        while not closed.wait(POLL_SECONDS):
            try:
                leaving = ray_nodes.draining()
                if leaving and len(nodes) < self.num_workers:
                    nodes = self.run.nodes_of(self.attempt)
                if request := self._driver_leaves(leaving) or leaving_request(leaving, nodes):
                    self.notify(request)
                    return
                if trains_since is None and self._can_grow and self._trains():
                    trains_since = time.monotonic()
                if not making_way and trains_since is not None and self._may_grow(time.monotonic() - trains_since):
                    looks_with_room = looks_with_room + 1 if self.room_for_more(self.num_workers) else 0
                    if looks_with_room >= _GROW_LOOKS:
                        self.notify(StopRequest("there is room for more workers", StopKind.RESIZE))
                        making_way = True
            except Exception as error:  # of Ray's own, and of the storage: the next look may find them well
                log.warning("looking after the cluster's nodes failed: %s", error)

    def _driver_leaves(self, leaving: Mapping[str, float | None]) -> StopRequest | None:
        if self.here in leaving:
            return StopRequest("the driver's node will be taken away", StopKind.STOP, leaving[self.here])
        path = Path(self.notice_file) if self.notice_file else None
        if path is not None and is_there(path):
            return StopRequest(f"{path} is there on the driver's node", StopKind.STOP, deadline_in(path))
        return None

    @property
    def _can_grow(self) -> bool:
        return self.bounds is not None and self.num_workers < self.bounds.max

    def _trains(self) -> bool:
        return any(event.kind == EventKind.TRAINING for event in read_events(self.run, self.attempt))

    def _may_grow(self, seconds: float) -> bool:
        return self.bounds is not None and self._can_grow and seconds > self.bounds.grow_after_s


def leaving_request(leaving: Mapping[str, float | None], nodes: Mapping[int, str]) -> StopRequest | None:
    """What to ask of an attempt whose ranks are on ``nodes`` while those in ``leaving`` will be gone, some at a known
    Unix time (pure)."""
    ranks = sorted(rank for rank, node in nodes.items() if node in leaving)
    if not ranks:
        return None
    deadlines = [at for node, at in leaving.items() if at is not None and node in {nodes[rank] for rank in ranks}]
    gone = sorted({nodes[rank][:8] for rank in ranks})
    named = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    reason = f"node {', '.join(gone[:4])} with rank {named} will be taken away"
    return StopRequest(reason, StopKind.PREEMPTED, min(deadlines, default=None))
