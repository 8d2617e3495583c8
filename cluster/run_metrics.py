"""The figures of a run, as Prometheus sees them. Knows neither Ray nor HTTP, and imports no torch.

Counters belong to the run: they go on over restarts of the workers, over a new command, over the loss of the process
that holds them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from data_shards import signed_json
from data_shards.errors import CorruptFile
from data_shards.storage import Storage
from trainer.checkpoint_manifest import Progress
from trainer.metrics import CommitTotals, Report

FILE = "metrics.json"
KIND = "baton-metrics"
VERSION = 1


class RunState(StrEnum):
    WAITING = "waiting"
    """for room on the cluster, or between a failure and the next attempt"""
    STARTING = "starting"
    """the workers come up and load the model"""
    RUNNING = "running"
    FINISHED = "finished"
    """trained; nobody is there to answer any more while it is exported"""
    STOPPED = "stopped"
    FAILED = "failed"


COUNTERS = {
    "baton_steps": "Optimizer steps executed, those that were lost and done again included",
    "baton_rows": "Packs trained on, repeats included",
    "baton_tokens": "Tokens trained on or read as context, repeats included",
    "baton_trained_tokens": "Tokens that a loss was taken on, repeats included",
    "baton_restarts": "Attempts after the run's first, whether after a failure or by a new command",
    "baton_lost_steps": "Steps that were executed after the last commit and had to be done again",
    "baton_skipped_steps": "Steps whose update was left out, because loss or gradients were inf or NaN",
    "baton_checkpoints": "Checkpoints committed",
    "baton_checkpoint_bytes": "Bytes of committed checkpoints, over all ranks",
    "baton_checkpoint_seconds": "Seconds for which training stood still for checkpoints",
}
STEP_SECONDS = "baton_step_seconds"
GAUGES = {
    "baton_step": "Completed optimizer steps of the run",
    "baton_num_steps": "Step at which the run ends",
    "baton_loss": "Loss of the last step: nats per trained token of its global batch",
    "baton_eval_loss": "Loss of the last evaluation: nats per trained token",
    "baton_learning_rate": "Learning rate of the last step",
    "baton_grad_norm": "Gradient norm of the last step before clipping",
    "baton_tokens_per_second": "Tokens per second over recent steps, all workers together",
    "baton_checkpoint_timestamp_seconds": "Unix time of the newest commit",
    "baton_checkpoint_step": "Step of the newest commit",
    "baton_last_checkpoint_bytes": "Bytes of the newest commit, over all ranks",
    "baton_last_checkpoint_seconds": "Seconds for which training stood still for the newest commit",
    "baton_slowest_rank_ratio": "Time of the slowest rank for a fixed piece of computing, to the median rank's",
    "baton_world_size": "Workers of the running attempt",
}


@dataclass
class Figures:
    """Everything that a scrape tells, and what is needed to go on counting."""

    counters: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0.0))
    step_seconds: dict[str, float] = field(default_factory=dict)
    """by part of a step"""
    gauges: dict[str, float] = field(default_factory=dict)
    position: Progress = field(default_factory=Progress)
    """up to where the attempt's work has been counted"""
    attempt: str | None = None
    commits: CommitTotals = field(default_factory=CommitTotals)
    """of the attempt that were counted"""

    def copy(self) -> Figures:
        return replace(
            self, counters=dict(self.counters), step_seconds=dict(self.step_seconds), gauges=dict(self.gauges)
        )

    def to_bytes(self) -> bytes:
        finite = {name: value for name, value in self.gauges.items() if math.isfinite(value)}
        return signed_json.encode(asdict(self) | {"gauges": finite}, KIND, VERSION)

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Figures:
        """Raises CorruptFile unless it is whole and ours."""
        body = signed_json.decode(data, KIND, VERSION, where)
        try:
            body["counters"] = dict.fromkeys(COUNTERS, 0.0) | body["counters"]
            position = Progress(**body["position"])
            commits = CommitTotals(body["commits"]["number"], body["commits"]["size_bytes"])
            return cls(**body | {"position": position, "commits": commits})
        except (KeyError, TypeError) as error:
            raise CorruptFile(f"{where}: a field is missing or of the wrong type ({error})") from error

    def raise_to(self, other: Figures) -> None:
        """No counter below that of ``other``."""
        for mine, theirs in ((self.counters, other.counters), (self.step_seconds, other.step_seconds)):
            for name, value in theirs.items():
                mine[name] = max(mine.get(name, 0.0), value)


class RunMetrics:
    """Turns reports into figures. Safe to use from several threads; no method waits for anything."""

    def __init__(self, restored: Figures | None = None) -> None:
        self._lock = threading.Lock()
        self._figures = restored.copy() if restored else Figures()
        self._superseded: set[str] = set()
        self._state = RunState.WAITING

    def attempt_started(self, number: int) -> None:
        """Args: number: 1 for the run's first attempt, of whatever command."""
        with self._lock:
            self._state = RunState.STARTING
            counters = self._figures.counters
            counters["baton_restarts"] = max(counters["baton_restarts"], number - 1.0)

    def set_state(self, state: RunState) -> None:
        with self._lock:
            self._state = state

    def report(self, report: Report) -> bool:
        """Count what is new in it. The last words of an attempt that has been superseded are ignored.

        Returns whether it told of a commit that was not counted before.
        """
        with self._lock:
            if report.attempt in self._superseded:
                return False
            if report.attempt != self._figures.attempt:
                self._begin(report)
            self._state = RunState.RUNNING
            self._count_work(report.progress)
            committed = report.commits != self._figures.commits
            self._count_commits(report.commits)
            self._figures.gauges |= _gauges(report)
            return committed

    def snapshot(self) -> tuple[Figures, RunState]:
        with self._lock:
            return self._figures.copy(), self._state

    def raise_to(self, other: Figures) -> None:
        """Go on from the higher of the two, counter by counter."""
        with self._lock:
            self._figures.raise_to(other)

    def _begin(self, report: Report) -> None:
        """Another attempt: what was done beyond its beginning is lost; what its beginning proves was done is counted,
        though the reports of it may have died with the process that held these figures."""
        figures = self._figures
        if figures.attempt is not None:
            self._superseded.add(figures.attempt)
        figures.counters["baton_lost_steps"] += max(0, figures.position.step - report.began_at.step)
        self._count_work(report.began_at)
        commit = report.last_commit
        if commit and commit.step == report.began_at.step > figures.gauges.get("baton_checkpoint_step", 0):
            figures.counters["baton_checkpoints"] += 1
            figures.counters["baton_checkpoint_bytes"] += commit.size_bytes
        figures.attempt, figures.commits = report.attempt, CommitTotals()

    def _count_work(self, now: Progress) -> None:
        figures, was = self._figures, self._figures.position
        for name, increment in (
            ("baton_steps", now.step - was.step),
            ("baton_rows", now.rows_consumed - was.rows_consumed),
            ("baton_tokens", now.tokens - was.tokens),
            ("baton_trained_tokens", now.trained_tokens - was.trained_tokens),
            ("baton_skipped_steps", now.skipped_steps - was.skipped_steps),
        ):
            figures.counters[name] += max(0, increment)
        for part, seconds in now.seconds.items():
            increment_s = max(0.0, seconds - was.seconds.get(part, 0.0))
            figures.step_seconds[part] = figures.step_seconds.get(part, 0.0) + increment_s
            if part == "checkpoint":
                figures.counters["baton_checkpoint_seconds"] += increment_s
        figures.position = now

    def _count_commits(self, now: CommitTotals) -> None:
        counters, was = self._figures.counters, self._figures.commits
        counters["baton_checkpoints"] += now.number - was.number
        counters["baton_checkpoint_bytes"] += now.size_bytes - was.size_bytes
        self._figures.commits = now


def _gauges(report: Report) -> dict[str, float]:
    """Those that the report knows."""
    known: dict[str, float | None] = {
        "baton_step": report.progress.step,
        "baton_num_steps": report.num_steps,
        "baton_world_size": report.world_size,
        "baton_loss": report.progress.last_loss,
        "baton_eval_loss": report.progress.eval_loss,
    }
    if step := report.last_step:
        known["baton_learning_rate"] = step.learning_rate
        known["baton_grad_norm"] = step.grad_norm
        known["baton_tokens_per_second"] = step.tokens_per_second
        known["baton_slowest_rank_ratio"] = step.slowest_rank_ratio
    if commit := report.last_commit:
        known["baton_checkpoint_step"] = commit.step
        known["baton_checkpoint_timestamp_seconds"] = commit.committed_at
        known["baton_last_checkpoint_bytes"] = commit.size_bytes
        known["baton_last_checkpoint_seconds"] = commit.seconds
    return {name: float(value) for name, value in known.items() if value is not None}


def families(run: str, figures: Figures, state: RunState) -> Iterator[Metric]:
    """The metrics of a scrape, all labelled with the run's name (pure)."""
    for name, text in COUNTERS.items():
        counter = CounterMetricFamily(name, text, labels=["run"])
        counter.add_metric([run], figures.counters[name])
        yield counter
    parts = CounterMetricFamily(STEP_SECONDS, "Wall seconds by what they went into", labels=["run", "part"])
    for part, seconds in sorted(figures.step_seconds.items()):
        parts.add_metric([run, part], seconds)
    yield parts
    for name, text in GAUGES.items():
        if name in figures.gauges:
            gauge = GaugeMetricFamily(name, text, labels=["run"])
            gauge.add_metric([run], figures.gauges[name])
            yield gauge
    states = GaugeMetricFamily("baton_run_state", "1 for the state that the run is in", labels=["run", "state"])
    for each in RunState:
        states.add_metric([run, each.value], float(each == state))
    yield states


class DurableMetrics:
    """A collector for a ``prometheus_client`` registry that shows no counter before the run directory has it.

    Whoever restores the file later then begins no lower than what any scrape has seen. Where the file can't be written,
    scrapes get the counters that were written last; gauges go on.
    """

    def __init__(self, run: str, storage: Storage, say: Callable[[str], None]) -> None:
        """Raises OSError where it can't be told what was counted before: counting anew would be a fall."""
        self._run = run
        self._storage = storage
        self._say = say
        self._saving = threading.Lock()
        self._trouble = ""
        self._saved = self._read() or Figures()
        self.metrics = RunMetrics(self._saved)

    def collect(self) -> Iterator[Metric]:
        with self._saving:
            figures, state = self._save()
        yield from families(self._run, figures, state)

    def save(self) -> None:
        """Write what is new. Does not raise: without a file there is less to restore, and training goes on."""
        with self._saving:
            self._save()

    def _save(self) -> tuple[Figures, RunState]:
        """Returns what may be shown."""
        figures, state = self.metrics.snapshot()
        if figures == self._saved:
            return figures, state
        try:
            on_disk = self._read()
            if on_disk is not None and on_disk != self._saved:
                # The monitor of a killed command may live a little longer than its command; neither takes back what
                # the other has shown.
                self.metrics.raise_to(on_disk)
                figures, state = self.metrics.snapshot()
            self._storage.write(FILE, [figures.to_bytes()])
        except OSError as error:
            self._complain(f"{self._storage.uri_of(FILE)} can't be written ({error}); counters stand still meanwhile")
            shown = figures.copy()
            shown.counters, shown.step_seconds = self._saved.counters, self._saved.step_seconds
            return shown, state
        self._trouble = ""
        self._saved = figures
        return figures, state

    def _read(self) -> Figures | None:
        try:
            return Figures.from_bytes(self._storage.read(FILE), self._storage.uri_of(FILE))
        except FileNotFoundError:
            return None
        except CorruptFile as error:
            self._complain(f"{error}; it is written anew")
            return None

    def _complain(self, trouble: str) -> None:
        """Each trouble once."""
        if trouble != self._trouble:
            self._trouble = trouble
            self._say(f"metrics: {trouble}")
