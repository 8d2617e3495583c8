"""Saves that training does not wait for: only the next update waits until this rank's slices are copied to host memory.

They are copied behind the forward and backward that come before it, which do not change them. Each rank's thread then
writes the rank's file and its receipt; rank 0's thread waits for all receipts and commits by
writing the manifest. No collective runs there: what the ranks must agree on (is a save still under way, did one fail)
travels with the all-reduce that each step makes anyway (``step.py``).
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from data_shards.errors import BatonError
from data_shards.storage import Storage
from trainer import checkpoint
from trainer.checkpoint import CheckpointRef, Slices
from trainer.checkpoint_manifest import CheckpointManifest
from trainer.engine import ZeroEngine
from trainer.errors import SaveFailed
from trainer.process_group import anywhere
from trainer.room import is_out_of_room
from trainer.staging import Staging

_NICENESS = 10
"""Of the writing thread: where processors are short, the step comes first."""
_PATIENCE = 2
"""Times ``commit_timeout_s``: to write a rank's own part, and then to wait for the others'."""
_LAST_WAIT_S = 30.0


@dataclass(frozen=True)
class Saved:
    """How a save ended on this rank."""

    step: int
    ref: CheckpointRef | None
    """what was committed; rank 0 alone knows"""
    error: Exception | None
    seconds: float
    """from the wish to the commit, or to this rank's receipt"""


class Saver:
    """One save at a time. Methods are called on the training thread."""

    def __init__(
        self,
        engine: ZeroEngine,
        checkpoints: Storage,
        *,
        commit_timeout_s: float,
        committed: Callable[[], object] = lambda: None,
        clear_node: Callable[[str], object] = lambda name: None,
    ) -> None:
        """
        Args:
            committed: called after commits, on rank 0, in a thread of its own: removing may take long, or hang.
            clear_node: called in the writing thread with a name before a checkpoint of the fast tier is written.
        """
        self._engine = engine
        self._checkpoints = checkpoints
        self._timeout_s = commit_timeout_s
        self._retention = _Behind(committed, "checkpoint-retention")
        self._clear_node = clear_node
        self.staging = Staging(engine.device)
        """host memory for one save; reserve it before the first has to wait for it"""
        engine.before_update(self._wait_for_copies)
        self._copied = threading.Event()
        self._copied.set()
        self.stall_seconds = 0.0
        """that training has waited for the last save that was begun"""
        self._thread: threading.Thread | None = None
        self._part_written = threading.Event()
        self._abandoned = threading.Event()
        self._give_up_at = math.inf
        self._target: Storage | None = None
        """of the last save"""
        self._ended: Saved | None = None
        self.failed = False
        """the last save that was begun failed here"""

    @property
    def rank(self) -> int:
        return self._engine.rank

    @property
    def where(self) -> str:
        return self._checkpoints.uri

    @property
    def out_of_room(self) -> bool:
        """The last save that was begun failed here, because the disk is full."""
        return self.failed and self._ended is not None and is_out_of_room(self._ended.error)

    @property
    def busy(self) -> bool:
        """A save is under way here."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def stuck(self) -> bool:
        """A save is under way here that should have been given up: the storage hangs."""
        return self.busy and time.monotonic() > self._give_up_at

    def begin(
        self,
        draft: CheckpointManifest,
        before: Callable[[], object] = lambda: None,
        *,
        discard_last: bool = False,
    ) -> None:
        """Have this rank's slices copied and written, as they are now. Every rank must call it at the same step. The
        engine's next update waits for the copies.

        Args:
            before: called in the writing thread, before anything is written.
            discard_last: the save before this one failed; rank 0 removes what is left of it.

        Raises RuntimeError while a save is under way.
        """
        if self.busy:
            raise RuntimeError("a save is under way; two must not overlap")
        started = time.perf_counter()
        self._ended, self.failed = None, False
        self._give_up_at = time.monotonic() + _PATIENCE * self._timeout_s
        self._part_written.clear()
        self._abandoned.clear()
        manifest = checkpoint.completed(draft, self._engine)
        copy = self.staging.begin_copy(self._engine.local_slices())
        self._copied.clear()
        self._thread = threading.Thread(
            target=self._run, args=(copy, manifest, before, discard_last), name="checkpoint-writer", daemon=True
        )
        self._thread.start()
        self.stall_seconds = time.perf_counter() - started

    def _wait_for_copies(self) -> None:
        if not self._copied.is_set():
            started = time.perf_counter()
            self._copied.wait()
            self.stall_seconds += time.perf_counter() - started

    def ended(self) -> Saved | None:
        """How the last save that was begun ended here; None while it is under way, or where there was none."""
        return None if self.busy else self._ended

    def abandon(self) -> None:
        """Another rank's part of the save under way failed: its receipt will not come."""
        self._abandoned.set()

    def finish(self) -> Saved:
        """Wait for the last save that was begun. Collective: what failed on one rank has failed on all.

        Raises SaveFailed, on all ranks, where the storage hangs.
        """
        assert self._thread is not None
        self._part_written.wait(self._until_given_up())
        if self.anywhere(self.failed or self.stuck):
            self.abandon()
        self._thread.join(self._until_given_up())
        if self.anywhere(self.busy):
            raise SaveFailed(self.stuck_message())
        assert self._ended is not None
        if self.anywhere(self.failed) and not self.failed:
            error = SaveFailed(f"the save of step {self._ended.step} failed on another rank")
            return replace(self._ended, ref=None, error=error)
        return self._ended

    def stuck_message(self) -> str:
        return (
            f"{self._checkpoints.uri}: writing has not ended within {_PATIENCE * self._timeout_s:.0f} s on some rank; "
            "the storage, or of the fast tier a node's disk, hangs or is far too slow (then raise "
            "checkpoint.commit_timeout_s)"
        )

    def finish_retention(self) -> None:
        """Wait until old checkpoints are removed; with patience, as nobody comes after this."""
        self._retention.wait(self._timeout_s)

    def close(self) -> None:
        """When training ends: a save under way may still become a checkpoint."""
        if self._thread is not None:
            self._thread.join(_LAST_WAIT_S)
        self._retention.wait(_LAST_WAIT_S)

    def _until_given_up(self) -> float:
        return max(0.0, self._give_up_at - time.monotonic())

    def anywhere(self, wish: bool) -> bool:
        """Whether it is so on any rank. Collective."""
        return anywhere(wish, self._engine.device)

    def _run(
        self,
        copy: Callable[[], Slices],
        manifest: CheckpointManifest,
        before: Callable[[], object],
        discard_last: bool,
    ) -> None:
        started = time.monotonic()
        ref, problem = None, None
        try:
            try:
                slices = copy()
            finally:
                self._copied.set()
            _give_way()  # not before: the next update waits for the copies
            target = checkpoint.target_of(self._checkpoints, manifest, self._engine.rank)
            if discard_last and self._target is not None and self._target.uri != target.uri:
                self._discard()  # never what is being written anew
            self._target = target
            before()
            if manifest.fast:
                self._clear_node(checkpoint.name_of(manifest))
            checkpoint.write_rank(target, self._engine.rank, slices, checkpoint.files_folder(target, manifest))
            if self._engine.rank == 0:
                self._part_written.set()
                self._await_receipts(target, manifest.world_size)
                ref = checkpoint.commit(target, manifest)
        except Exception as error:  # whatever it is, it is told where training goes on
            problem = error
        self._ended = Saved(manifest.progress.step, ref, problem, time.monotonic() - started)
        self.failed = problem is not None
        self._part_written.set()
        if ref is not None:
            self._retention.start()

    def take_retention_error(self) -> Exception | None:
        """Why old checkpoints could not be removed, once."""
        return self._retention.take_error()

    def discard_last(self) -> None:
        """Remove what the last save left, if it failed: it is of no use, and on a full disk in the way. Every rank must
        have ended writing it; while a save is under way here, nothing is done."""
        if not self.busy:
            self._discard()

    def _discard(self) -> None:
        if self._engine.rank == 0 and self._target is not None:
            with suppress(OSError, BatonError):  # it was committed after all, or stays in the way
                checkpoint.discard(self._target)
                self._target = None

    def _await_receipts(self, target: Storage, world_size: int) -> None:
        deadline = time.monotonic() + self._timeout_s
        pause = 0.01
        while missing := checkpoint.missing_receipts(target, world_size):
            if self._abandoned.is_set():
                raise SaveFailed(f"{target.uri}: a rank could not write its part")
            if time.monotonic() > deadline:
                ranks = ", ".join(map(str, missing[:8]))
                raise SaveFailed(
                    f"{target.uri}: nothing came from rank {ranks} within {self._timeout_s:.0f} s. Its disk is too "
                    "slow (raise checkpoint.commit_timeout_s) or hangs"
                )
            self._abandoned.wait(pause)
            pause = min(1.0, 2 * pause)


class _Behind:
    """An action in a thread of its own, once at a time; it is done again for wishes that come while it runs."""

    def __init__(self, action: Callable[[], object], name: str) -> None:
        self._action = action
        self._name = name
        self._lock = threading.Lock()
        self._wishes = 0
        """that were made since the action was last begun, and the one that it is under way for"""
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self) -> None:
        with self._lock:
            self._wishes += 1
            if self._wishes == 1:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        _give_way()
        while True:
            with self._lock:
                answered = self._wishes
            try:
                self._action()
            except Exception as error:  # what was committed is committed all the same
                self._error = error
            with self._lock:
                self._wishes -= answered
                if not self._wishes:
                    return

    def take_error(self) -> Exception | None:
        error, self._error = self._error, None
        return error

    def wait(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.join(seconds)


def _give_way() -> None:
    """On Linux a thread has a niceness of its own; elsewhere the number of a thread is not that of a process."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
