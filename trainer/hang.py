"""What ranks say about a hang, and what follows from it together: which of them holds the others up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from data_shards.errors import BatonError, CorruptFile
from data_shards.storage import Storage
from trainer.pulse import Phase
from trainer.run_directory import read_json, write_json

_MOST_NAMED = 8


class Hang(BatonError):
    """There was no step, or no other progress, for far longer than usual; the process is ended with it."""

    retryable = True


@dataclass(frozen=True)
class HangReport:
    """``attempts/<id>/hangs/rank-00000.json``: where a rank was when it noticed."""

    rank: int
    node: str
    step: int
    phase: str
    num_entered: int
    """phases until then (``Pulse.num_entered``)"""
    collectives: int | None
    """that it has started, where the process group counts them"""
    silent_s: float
    """since its last progress"""
    usual_s: float | None
    """median of the attempt's steps; None before the first"""
    limit_s: float


@dataclass(frozen=True)
class Verdict:
    missing: tuple[int, ...]
    """ranks that have not reported"""
    behind: tuple[int, ...]
    """ranks that did less than others, who wait for them"""

    @property
    def suspects(self) -> tuple[int, ...]:
        return self.missing or self.behind


def verdict(reports: Mapping[int, HangReport], world_size: int) -> Verdict:
    """Who holds the others up (pure). By the collectives that each has started, else by the phases that it entered."""
    missing = tuple(rank for rank in range(world_size) if rank not in reports)
    counts = {rank: report.collectives for rank, report in reports.items()}
    if None in counts.values() or len(set(counts.values())) < 2:
        counts = {rank: report.num_entered for rank, report in reports.items()}
    least = min(counts.values(), key=lambda count: count or 0, default=0)
    behind = tuple(sorted(rank for rank, count in counts.items() if count == least))
    return Verdict(missing, behind if len(behind) < len(reports) else ())


def message(mine: HangReport, found: Verdict, reports: Mapping[int, HangReport], stacks: str) -> str:
    """All that a person needs, in one line (pure)."""
    usual = "no step was done yet" if mine.usual_s is None else f"a step usually takes {mine.usual_s:.3g} s"
    knob = "watchdog.first_step_s" if mine.usual_s is None else "watchdog.factor and watchdog.at_least_s"
    if mine.phase == Phase.ENDING:
        knob = "checkpoint.commit_timeout_s"
    text = (
        f"no progress for {mine.silent_s:.0f} s in step {mine.step}, {mine.phase} ({usual}; the limit is "
        f"{mine.limit_s:.0f} s, by {knob})"
    )
    if found.missing:
        text += (
            f". {_ranks(found.missing)} did not report: stopped, blocked in native code that holds the interpreter, or "
            "gone with its machine"
        )
    elif found.behind:
        places = ", ".join(f"rank {rank} on {reports[rank].node} in {reports[rank].phase}" for rank in found.behind[:8])
        text += f". The others wait for {places}"
    return f"{text}. Stacks of all threads: {stacks}"


def _ranks(ranks: Sequence[int]) -> str:
    named = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", …" if len(ranks) > _MOST_NAMED else "")
    return f"{'Rank' if len(ranks) == 1 else 'Ranks'} {named}"


def write_report(attempt: Storage, report: HangReport) -> None:
    write_json(attempt, f"hangs/rank-{report.rank:05d}.json", asdict(report))


def read_reports(attempt: Storage) -> dict[int, HangReport]:
    """By rank. Raises OSError where the storage can't be read."""
    folder, found = attempt.child("hangs"), {}
    for name in folder.list():
        with suppress(CorruptFile, TypeError):  # half written: it counts the next time
            if value := read_json(folder, name):
                found[int(value["rank"])] = HangReport(**value)
    return found
