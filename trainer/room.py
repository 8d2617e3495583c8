"""Room on the disk for the next save; where there is too little, retention makes some. Rank 0 looks after it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from data_shards.errors import BatonError
from data_shards.storage import OUT_OF_ROOM

_POLL_SECONDS = 1.0


def is_out_of_room(error: BaseException | None) -> bool:
    """Whether a full disk or a used-up quota caused it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in OUT_OF_ROOM:
            return True
        error = error.__cause__
    return False


class Room:
    """What free space a save needs and whether it is there, looked at in a thread: a file system may hang.

    ``short`` and ``exhausted`` may be read at any time; the other methods belong to the training thread.
    """

    def __init__(
        self,
        needed_bytes: int,
        free_bytes: Callable[[], int | None],
        clear: Callable[[], object],
        remove: Callable[[], Sequence[str]],
        warn: Callable[[str], None],
    ) -> None:
        """
        Args:
            free_bytes: on the disk that saves go to; None where nobody knows.
            clear: takes away what a failed save has left.
            remove: takes away the checkpoints that are no more than a reserve; gives their names.
            warn: tells a person.
        """
        self._needed = needed_bytes
        self._free_bytes = free_bytes
        self._clear = clear
        self._remove = remove
        self._warn = warn
        self._denied = False
        """a save found no room where there seemed to be some: a quota, or others who fill the disk"""
        self._lock = threading.Lock()
        """looking and removing, which may take long"""
        self._state = threading.Lock()
        self._wanted = threading.Event()
        self._closed = threading.Event()
        self.short = False
        """there is too little, as far as is known"""
        self.exhausted = False
        """there is too little, and nothing more may be removed"""

    def watch(self) -> None:
        """Look now, and from now on every second in a thread."""
        self._look()
        threading.Thread(target=self._keep_looking, name="disk-room", daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._wanted.set()

    def want(self) -> None:
        """A save is due, and there is too little room for it."""
        self._wanted.set()

    def deny(self) -> None:
        """A save failed for want of room."""
        with self._state:
            self._denied = self.short = True

    def make(self) -> bool:
        """Make room now. Returns whether a save may be tried (again)."""
        with self._lock:
            self._make()
            return not self.short

    def _keep_looking(self) -> None:
        while True:
            wanted = self._wanted.wait(_POLL_SECONDS)
            if self._closed.is_set():
                return
            with self._lock:
                self._look()
                if wanted and self.short:
                    self._make()
                self._wanted.clear()  # wishes that came meanwhile meant the same

    def _look(self) -> None:
        try:
            free = self._free_bytes()
        except OSError:
            return  # the next save will tell
        with self._state:
            self.short = self._denied or (free is not None and free < self._needed)
            if not self.short:
                self.exhausted = False

    def _make(self) -> None:
        self._clear()
        self._look()
        if not self.short:
            return
        try:
            removed = self._remove()
        except (OSError, BatonError) as error:
            self._warn(f"old checkpoints could not be removed to make room: {error}")
            removed = []
        if removed:
            self._warn(f"the disk is full: removed {', '.join(removed)} to make room for the next save")
            with self._state:
                self._denied = False
        self._look()
        self.exhausted = self.short


class EndlessRoom(Room):
    """Of the other ranks: rank 0 looks after it for all."""

    def __init__(self) -> None:
        super().__init__(0, lambda: None, lambda: None, list, lambda text: None)

    def deny(self) -> None: ...
