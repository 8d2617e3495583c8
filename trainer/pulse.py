"""What the training thread is doing, told by itself. Who looks on (``watchdog.py``) reads it from another thread."""

from __future__ import annotations

import time
from collections import deque
from enum import StrEnum

_STEPS_KEPT = 64


class Phase(StrEnum):
    STARTING = "starting"
    DATA = "data"
    FORWARD_BACKWARD = "forward_backward"
    CHECKPOINT = "checkpoint"
    UPDATE = "update"
    AGREEMENT = "agreement"
    BETWEEN = "between steps"
    EVALUATION = "evaluation"
    ENDING = "ending"
    """the last save, and what comes after it"""


class Pulse:
    """Costs the training thread an assignment: there are no locks, since each attribute has one writer."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.step = 0
        """the one under way or, between steps, the last; 1 is the first"""
        self.num_entered = 0
        """phases entered so far: equal on all ranks that are at the same place"""
        self.beat_at = time.monotonic()
        """when there last was progress"""
        self.step_seconds: deque[float] = deque(maxlen=_STEPS_KEPT)
        """of the attempt's last steps"""
        self.num_steps = 0
        """that this attempt has done"""
        self._began_at = self.beat_at

    def enter(self, phase: Phase) -> None:
        """Goes on to another part of what is under way; that alone is no progress."""
        self.phase = phase
        self.num_entered += 1

    def beat(self, phase: Phase) -> None:
        """There is progress, and ``phase`` begins, or goes on with its next piece."""
        self.enter(phase)
        self.beat_at = time.monotonic()

    def begin_step(self, step: int) -> None:
        self.step = step
        self.beat(Phase.DATA)
        self._began_at = self.beat_at

    def end_step(self) -> None:
        self.beat(Phase.BETWEEN)
        self.step_seconds.append(self.beat_at - self._began_at)
        self.num_steps += 1
