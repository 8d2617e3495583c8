"""What rank 0 reports while it trains, and where reports go.

A report carries totals, not increments: one that is lost costs nothing once the next arrives. This module imports no
torch, so that whoever receives reports needs none.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from trainer.checkpoint_manifest import CheckpointManifest, Progress


@dataclass(frozen=True)
class Commit:
    """A committed checkpoint, as far as it is reported."""

    step: int
    size_bytes: int
    """over all ranks, without the manifest"""
    committed_at: float
    """Unix seconds"""
    seconds: float | None
    """that training stood still for it; None where it was made before this attempt"""

    @classmethod
    def of(cls, manifest: CheckpointManifest, seconds: float | None = None) -> Commit:
        created = datetime.fromisoformat(manifest.created).timestamp()
        return cls(manifest.progress.step, sum(entry.size for entry in manifest.files), created, seconds)


@dataclass(frozen=True)
class StepFigures:
    """Of the last step."""

    learning_rate: float
    grad_norm: float
    """before clipping"""
    tokens_per_second: float
    """over recent steps, all workers together, evaluations and checkpoints left out"""
    slowest_rank_ratio: float | None = None
    """of computing times at the last look, slowest rank to median; None where nobody has looked yet"""


@dataclass(frozen=True)
class CommitTotals:
    """Over one attempt."""

    number: int = 0
    size_bytes: int = 0


@dataclass(frozen=True)
class Report:
    """Where an attempt stands."""

    attempt: str
    began_at: Progress
    """where the run stood when the attempt began"""
    progress: Progress
    num_steps: int
    world_size: int
    last_step: StepFigures | None
    """None before the attempt's first step"""
    last_commit: Commit | None
    """the one that it resumed from until it makes its own"""
    commits: CommitTotals


class MetricsSink(Protocol):
    """Where reports go."""

    def send(self, report: Report) -> None:
        """Called on the training thread, on rank 0, when the attempt begins and after steps, evaluations and commits.
        Must neither wait nor raise."""
        ...


class NoMetrics:
    """For launchers without a monitor, and for all ranks but 0."""

    def send(self, report: Report) -> None:
        return None


class Reporter:
    """Makes an attempt's reports out of what the loop did.

    Sending takes about a millisecond of the training thread, so steps that follow each other faster than
    ``at_most_every_s`` are not all reported; evaluations and commits always are.
    """

    def __init__(
        self,
        sink: MetricsSink,
        attempt: str,
        began_at: Progress,
        *,
        num_steps: int,
        world_size: int,
        at_most_every_s: float = 0.1,
    ) -> None:
        self._sink = sink
        self._attempt = attempt
        self._began_at = began_at
        self._num_steps = num_steps
        self._world_size = world_size
        self._at_most_every_s = at_most_every_s
        self._sent_at = -math.inf
        self._last_step: StepFigures | None = None
        self._last_commit: Commit | None = None
        self._commits = CommitTotals()

    def began(self, resumed_from: CheckpointManifest | None) -> None:
        self._last_commit = Commit.of(resumed_from) if resumed_from else None
        self._send(self._began_at)

    def stepped(self, progress: Progress, last: StepFigures) -> None:
        self._last_step = last
        if time.monotonic() >= self._sent_at + self._at_most_every_s:
            self._send(progress)

    def evaluated(self, progress: Progress) -> None:
        self._send(progress)

    def committed(self, progress: Progress, manifest: CheckpointManifest, seconds: float) -> None:
        commit = Commit.of(manifest, seconds)
        self._last_commit = commit
        self._commits = CommitTotals(self._commits.number + 1, self._commits.size_bytes + commit.size_bytes)
        self._send(progress)

    def _send(self, progress: Progress) -> None:
        self._sent_at = time.monotonic()
        self._sink.send(
            Report(
                attempt=self._attempt,
                began_at=self._began_at,
                progress=progress,
                num_steps=self._num_steps,
                world_size=self._world_size,
                last_step=self._last_step,
                last_commit=self._last_commit,
                commits=self._commits,
            )
        )
