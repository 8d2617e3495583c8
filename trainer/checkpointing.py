"""When saves begin, and what follows from how they end. All ranks decide alike: by what they told each other with the
last step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from trainer.checkpoint_manifest import CheckpointManifest, Progress
from trainer.errors import DiskFull, SaveFailed
from trainer.metrics import Reporter
from trainer.progress_log import ProgressLog
from trainer.room import Room
from trainer.saving import Saved, Saver
from trainer.step import Standing

_MOST_FAILED_SAVES = 3
"""Of durable ones, in a row; then the attempt ends."""


class Tier(StrEnum):
    DURABLE = "durable"
    """under run.storage"""
    FAST = "fast"
    """on the nodes' own disks: one that fails is told, and no more"""


_ADVICE = {
    (Tier.DURABLE, Tier.DURABLE): "raise checkpoint.every_steps, or use faster storage",
    (Tier.DURABLE, Tier.FAST): "the fast tier goes on after it",
    (Tier.FAST, Tier.FAST): "raise checkpoint.fast.every_steps, or use a faster disk",
}
"""where a save is under way, and another is due"""


@dataclass(frozen=True)
class Cadence:
    """When saves are due, and where those of the fast tier go."""

    every_steps: int
    fast_every_steps: int | None = None
    files_at: str | None = None

    def due(self, step: int) -> Tier | None:
        if step % self.every_steps == 0:
            return Tier.DURABLE
        return Tier.FAST if self.fast_every_steps is not None and step % self.fast_every_steps == 0 else None


@dataclass
class _Save:
    """The last save that was begun."""

    step: int
    tier: Tier
    stall_seconds: float = 0.0
    """beside what the saver counts: waiting for its end"""
    failed: bool = False
    """on any rank; all ranks know it at the same step"""
    told: bool = False


class Checkpointing:
    """Looks after the saves of one attempt on one rank."""

    def __init__(
        self,
        saver: Saver,
        room: Room,
        cadence: Cadence,
        saved_step: int | None,
        draft: Callable[[Progress], CheckpointManifest],
        log: ProgressLog,
        reporter: Reporter,
    ) -> None:
        """
        Args:
            saved_step: at which the attempt begins, where a durable checkpoint of it is there.
            draft: what a checkpoint says beside its tensors, but for what the engine and its files add.
        """
        self.saver = saver
        self.room = room
        self._cadence = cadence
        self._draft = draft
        self._log = log
        self._reporter = reporter
        self._save: _Save | None = None
        self._due: Tier | None = None
        self._come_again = False
        self._given_step = saved_step
        """whose state was last given to the saver for a durable checkpoint, or was loaded from one"""
        self._failed_in_a_row = 0
        self.last_save_seconds = 0.0
        """that the last durable save took, from the wish to the commit or to this rank's receipt; 0: none was made"""

    def standing(self) -> Standing:
        """What this rank tells the others with a step."""
        saver, room = self.saver, self.room
        return Standing(
            saving=saver.busy,
            save_failed=saver.failed,
            save_stuck=saver.stuck,
            out_of_room=saver.out_of_room,
            room_short=room.short,
            room_exhausted=room.exhausted,
        )

    def look_after(self, progress: Progress, standing: Standing) -> None:
        """After each step: tell how the save under way ended, if it has.

        Raises SaveFailed where the storage hangs or too many saves in a row have failed.
        """
        if self._save is None:
            return
        if standing.save_failed and not self._save.failed:
            self.saver.abandon()
            self._save.failed = True
            if self._save.tier == Tier.DURABLE:
                self._durable_failed(standing)
        if (ended := self.saver.ended()) is not None:
            self._tell(progress, self._save, ended)
        if standing.save_stuck:
            raise SaveFailed(self.saver.stuck_message())
        if self._failed_in_a_row >= _MOST_FAILED_SAVES:
            raise SaveFailed(f"{self._failed_in_a_row} saves in a row failed, the last that of step {self._save.step}")

    def _durable_failed(self, standing: Standing) -> None:
        """For want of room it is tried again; other failures are counted."""
        if standing.out_of_room:
            self.room.deny()
            self._due, self._come_again = Tier.DURABLE, True
        else:
            self._failed_in_a_row += 1

    def save_if_due(self, progress: Progress, standing: Standing) -> float:
        """Begin a save; or leave it out while another is being written; or, where there is no room, have some made and
        come again with the next step. Returns the seconds that training waited; the next step waits for the rest.

        Raises DiskFull where there is no room and none can be made.
        """
        self._due = _first_of(self._due, self._cadence.due(progress.step))
        if self._come_again:  # ``standing`` is from before the room was found to be short
            self._come_again = False
            return 0.0
        if self._due is None:
            return 0.0
        if standing.saving and self._save is not None:
            self._leave_out_or_wait(progress, self._save, self._due)
        elif self._due == Tier.FAST:
            return self._begin(progress, Tier.FAST)
        elif standing.room_exhausted:
            raise self._disk_full()
        elif standing.room_short:
            self.room.want()
        else:
            return self._begin(progress, Tier.DURABLE)
        return 0.0

    def _leave_out_or_wait(self, progress: Progress, save: _Save, due: Tier) -> None:
        """A save is due while another is under way: it begins once all ranks have ended one that failed, or one of the
        fast tier that a durable one waits for; else it is left out."""
        if save.failed or (save.tier, due) == (Tier.FAST, Tier.DURABLE):
            return
        self._due = None
        self._log.say(
            f"the save of step {save.step} is still being written, so step {progress.step} is not saved; "
            + _ADVICE[save.tier, due]
        )

    def save_at_end(self, progress: Progress) -> float:
        """Finish what was begun, and save what is not saved. Collective. Returns the seconds that training waited.

        Raises SaveFailed where the last save fails, DiskFull where there is no room for it and none can be made.
        """
        started = time.perf_counter()
        self._finish(progress)
        while self._given_step != progress.step:
            self.saver.discard_last()  # before the collective: then no rank has begun anew
            if self.saver.anywhere(self.room.short) and self.saver.anywhere(not self.room.make()):
                raise self._disk_full()
            self._begin(progress, Tier.DURABLE)
            ended = self._finish(progress)
            if ended is None or ended.error is None:
                break
            if not self.saver.anywhere(self.saver.out_of_room):
                raise SaveFailed(f"step {ended.step} could not be saved: {ended.error}") from ended.error
            self.room.deny()
            self._given_step = None
        self.saver.finish_retention()
        self.close()
        return time.perf_counter() - started

    def close(self) -> None:
        """When training ends, well or not. May be called again."""
        self.room.close()
        self.saver.close()
        self._tell_retention()

    def _begin(self, progress: Progress, tier: Tier) -> float:
        last = self._save
        failed = last is not None and last.failed
        if last is not None and last.tier == Tier.DURABLE and not failed:
            self._failed_in_a_row = 0
        draft = self._draft(progress)
        if tier == Tier.FAST:
            draft = replace(draft, files_at=self._cadence.files_at)
        else:
            self._given_step = progress.step
        self.saver.begin(draft, before=self._log.flushing(), discard_last=failed)
        self._save = _Save(progress.step, tier)
        self._due = None
        return self.saver.stall_seconds

    def _finish(self, progress: Progress) -> Saved | None:
        """Wait for the last save. Collective. Returns how it ended; None where there was none."""
        if self._save is None:
            return None
        started = time.perf_counter()
        ended = self.saver.finish()
        self._save.stall_seconds += time.perf_counter() - started
        self._save.failed = ended.error is not None  # as on all ranks
        self._tell(progress, self._save, ended)
        return ended

    def _tell(self, progress: Progress, save: _Save, ended: Saved) -> None:
        self._tell_retention()
        if save.told:
            return
        save.told = True
        stall_seconds = self.saver.stall_seconds + save.stall_seconds
        if ended.error is not None:
            self._log.warn(f"rank {self.saver.rank}: the save of step {ended.step} failed: {ended.error}")
            return
        if save.tier == Tier.DURABLE:
            self.last_save_seconds = ended.seconds
        if ended.ref is not None:
            if save.tier == Tier.DURABLE:  # alerts ask for the age of what can't be lost
                self._reporter.committed(progress, ended.ref.manifest, stall_seconds)
            where = " on the nodes" if save.tier == Tier.FAST else ""
            self._log.say(
                f"committed step {ended.step}{where}: {ended.seconds:.2f}s, of which training waited "
                f"{stall_seconds:.2f}s"
            )

    def _tell_retention(self) -> None:
        if (error := self.saver.take_retention_error()) is not None:
            self._log.warn(f"old checkpoints could not be removed: {error}")

    def _disk_full(self) -> DiskFull:
        return DiskFull(
            f"the disk of {self.saver.where} is full and nothing more may be removed; what was committed is intact. "
            "Make room there, drop checkpoint.keep_every or checkpoint.keep_best, or move the run to a larger disk; "
            "then give the same command again"
        )


def _first_of(waiting: Tier | None, due: Tier | None) -> Tier | None:
    """A durable save is worth more than one of the fast tier."""
    return Tier.DURABLE if Tier.DURABLE in (waiting, due) else waiting or due
