"""Figures of a run: what is counted, what survives, and that nothing is shown before it is on disk."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import MetricsConfig
from cluster.local_processes import free_port
from cluster.run_metrics import COUNTERS, FILE, DurableMetrics, Figures, RunMetrics, RunState
from cluster.run_monitor import RunMonitor, wait_for_last_scrape_s
from data_shards.hashed_file import FileEntry
from data_shards.storage import Storage
from tests.support.command import ROOT
from tests.support.tiny import DRAFT
from trainer.checkpoint_manifest import CheckpointManifest, Progress
from trainer.metrics import Report, Reporter, StepFigures
from trainer.rank_file import RankFile

Samples = dict[tuple[str, str], float]


def at(step: int, **more: Any) -> Progress:
    """After ``step`` steps of 6 rows, 600 tokens, 100 of them trained, and 0.5 s each; every fifth waits for a save."""
    work = {"rows_consumed": 6 * step, "tokens": 600 * step, "trained_tokens": 100 * step}
    seconds = {"optimizer": 0.5 * step, "checkpoint": 0.25 * (step // 5)}
    return Progress(step=step, **work, seconds=seconds, last_loss=2.0, skipped_steps=step // 10, **more)


def manifest_of(step: int, size: int = 1000) -> CheckpointManifest:
    return replace(
        DRAFT, world_size=1, progress=at(step), files=(RankFile("rank-00000.safetensors", size, 32768, None),)
    )


class Sent(list[Report]):
    """A sink that keeps what it gets."""

    def send(self, report: Report) -> None:
        self.append(report)


def attempt(name: str, begin: int, end: int, every: int = 5) -> list[Report]:
    """The reports of an attempt that ran steps ``(begin, end]`` and committed each step that ``every`` divides."""
    sent = Sent()
    reporter = Reporter(sent, name, at(begin), num_steps=100, world_size=2, at_most_every_s=0)
    reporter.began(manifest_of(begin) if begin else None)
    for step in range(begin + 1, end + 1):
        reporter.stepped(at(step), StepFigures(1e-3, 0.7, 4000.0))
        if step % every == 0:
            reporter.committed(at(step), manifest_of(step), 0.25)
    return sent


def tell(metrics: RunMetrics, reports: list[Report]) -> Figures:
    for report in reports:
        metrics.report(report)
    return metrics.snapshot()[0]


def samples(collector: Any) -> Samples:
    """By name and the value of the label that is not the run's."""
    registry = CollectorRegistry()
    registry.register(collector)
    return parsed(generate_latest(registry).decode())


def parsed(text: str) -> Samples:
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["run"] == "demo"
            found[sample.name, sample.labels.get("part", sample.labels.get("state", ""))] = sample.value
    return found


def fallen(before: Samples, after: Samples) -> dict[tuple[str, str], tuple[float, float | None]]:
    counters = {key: value for key, value in before.items() if key[0].endswith("_total")}
    assert len(counters) >= len(COUNTERS)
    return {key: (was, after.get(key)) for key, was in counters.items() if after.get(key, -1.0) < was}


def test_steps_lost_between_attempts_are_counted() -> None:
    metrics = RunMetrics()
    metrics.attempt_started(1)
    tell(metrics, attempt("a", 0, 13))
    metrics.attempt_started(2)
    figures = tell(metrics, attempt("b", 10, 20))
    assert figures.counters == {
        "baton_steps": 23,
        "baton_rows": 23 * 6,
        "baton_tokens": 23 * 600,
        "baton_trained_tokens": 23 * 100,
        "baton_restarts": 1,
        "baton_lost_steps": 3,
        "baton_skipped_steps": 2,
        "baton_checkpoints": 4,
        "baton_checkpoint_bytes": 4000,
        "baton_checkpoint_seconds": 1.0,
    }
    assert figures.step_seconds == {"optimizer": 23 * 0.5, "checkpoint": 1.0}
    assert figures.gauges["baton_step"] == figures.gauges["baton_checkpoint_step"] == 20
    assert figures.gauges["baton_world_size"] == 2 and figures.gauges["baton_last_checkpoint_seconds"] == 0.25
    assert "baton_eval_loss" not in figures.gauges, "nothing is shown that was never measured"


def test_lost_reports_are_made_good_by_the_next() -> None:
    reports = attempt("a", 0, 20)
    assert tell(RunMetrics(), reports[:3] + reports[-1:]) == tell(RunMetrics(), reports)


def test_steps_in_a_rush_are_reported_together() -> None:
    """Sending costs the training thread time, so fast steps share a report; commits are always told."""
    sent = Sent()
    reporter = Reporter(sent, "a", at(0), num_steps=100, world_size=2, at_most_every_s=3600)
    reporter.began(None)
    for step in range(1, 51):
        reporter.stepped(at(step), StepFigures(1e-3, 0.7, 4000.0))
    assert [report.progress.step for report in sent] == [0]
    reporter.committed(at(50), manifest_of(50), 0.25)
    assert [report.progress.step for report in sent] == [0, 50]
    assert tell(RunMetrics(), sent).counters["baton_steps"] == 50


def test_last_words_of_a_superseded_attempt_are_ignored() -> None:
    metrics = RunMetrics()
    old = attempt("a", 0, 14)
    tell(metrics, [*old[:-1], *attempt("b", 10, 12)])
    before = metrics.snapshot()[0]
    assert tell(metrics, old[-1:]) == before


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_any_history_balances_and_never_falls(lengths: list[int], random: Any) -> None:
    """Attempts of any length, each from the last commit before; reports lost at random, but for each attempt's last:
    executed steps are kept plus lost ones, and no counter ever falls."""
    metrics = RunMetrics()
    done = committed = executed = 0
    before = metrics.snapshot()[0]
    for number, length in enumerate(lengths, 1):
        metrics.attempt_started(number)
        executed += length
        reports = attempt(f"a{number}", committed, done := committed + length)
        for report in [report for report in reports[:-1] if random.random() < 0.6] + reports[-1:]:
            metrics.report(report)
            after = metrics.snapshot()[0]
            assert all(after.counters[name] >= value for name, value in before.counters.items())
            before = after
        committed = done - done % 5
    counters = before.counters
    assert counters["baton_steps"] == executed == done + counters["baton_lost_steps"]
    assert counters["baton_restarts"] == len(lengths) - 1


@pytest.fixture
def lines() -> list[str]:
    return []


def durable(folder: Path, lines: list[str]) -> DurableMetrics:
    return DurableMetrics("demo", Storage.at(folder), lines.append)


def test_counters_go_on_after_the_monitor_is_lost(tmp_path: Path, lines: list[str]) -> None:
    """Lost after step 13 was told and shown up to 12; the run goes on from the commit of step 10."""
    first = durable(tmp_path, lines)
    first.metrics.attempt_started(1)
    reports = attempt("a", 0, 13)
    tell(first.metrics, reports[:-1])
    seen = samples(first)
    tell(first.metrics, reports[-1:])
    second = durable(tmp_path, lines)
    assert not fallen(seen, samples(second))
    second.metrics.attempt_started(2)
    tell(second.metrics, attempt("b", 10, 15))
    after = samples(second)
    assert not fallen(seen, after)
    assert after["baton_lost_steps_total", ""] == 2 and after["baton_steps_total", ""] == 17
    assert after["baton_checkpoints_total", ""] == 3 and not lines


def test_commits_prove_steps_that_were_never_told(tmp_path: Path, lines: list[str]) -> None:
    """The monitor was lost before it wrote anything but step 3; the run goes on from the commit of step 10."""
    first = durable(tmp_path, lines)
    tell(first.metrics, attempt("a", 0, 3))
    first.save()
    second = durable(tmp_path, lines)
    counters = tell(second.metrics, attempt("b", 10, 11)).counters
    assert counters["baton_steps"] == 11 and counters["baton_rows"] == 66 and counters["baton_lost_steps"] == 0
    assert counters["baton_checkpoints"] == 1 and counters["baton_checkpoint_bytes"] == 1000


def test_the_same_attempt_goes_on_with_a_monitor_brought_up_again(tmp_path: Path, lines: list[str]) -> None:
    reports = attempt("a", 0, 20)
    first = durable(tmp_path, lines)
    tell(first.metrics, reports[:8])
    first.save()
    assert tell(durable(tmp_path, lines).metrics, reports[12:]) == tell(RunMetrics(), reports)


class _WatchedStorage:
    """A storage that notes what was written, and fails on demand."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.uri_of = storage.uri_of
        self.broken = False
        self.written: list[Figures] = []

    def read(self, relative: str) -> bytes:
        return self._storage.read(relative)

    def write(self, relative: str, chunks: Any) -> FileEntry:
        if self.broken:
            raise OSError(28, "No space left on device")
        data = b"".join(chunks)
        self.written.append(Figures.from_bytes(data, relative))
        return self._storage.write(relative, [data])


def test_nothing_is_shown_before_it_is_on_disk(tmp_path: Path, lines: list[str]) -> None:
    storage = _WatchedStorage(Storage.at(tmp_path))
    collector = DurableMetrics("demo", storage, lines.append)  # type: ignore[arg-type]
    for report in attempt("a", 0, 12):
        collector.metrics.report(report)
        shown = samples(collector)
        assert shown["baton_steps_total", ""] == storage.written[-1].counters["baton_steps"] == report.progress.step
    storage.broken = True
    tell(collector.metrics, attempt("a", 0, 14)[-1:])
    stuck = samples(collector)
    assert stuck["baton_steps_total", ""] == 12 and stuck["baton_step", ""] == 14
    assert samples(collector) == stuck and len(lines) == 1 and "No space left" in lines[0], lines
    assert not fallen(stuck, samples(durable(tmp_path, lines)))
    storage.broken = False
    assert samples(collector)["baton_steps_total", ""] == 14


def test_what_another_monitor_has_shown_is_not_taken_back(tmp_path: Path, lines: list[str]) -> None:
    """A killed command's monitor may answer a little longer, while the next command's has begun."""
    old = durable(tmp_path, lines)
    tell(old.metrics, attempt("a", 0, 10))
    samples(old)
    new = durable(tmp_path, lines)
    tell(old.metrics, attempt("a", 0, 14)[-4:])
    seen = samples(old)
    tell(new.metrics, attempt("b", 10, 11))
    assert not fallen(seen, samples(new))


@pytest.mark.parametrize("damage", [b"", b"{}", b'{"kind": "baton-metrics"}', None])
def test_damaged_file_is_named_and_written_anew(tmp_path: Path, lines: list[str], damage: bytes | None) -> None:
    tell((first := durable(tmp_path, lines)).metrics, attempt("a", 0, 10))
    first.save()
    path = tmp_path / FILE
    path.write_bytes(
        path.read_bytes().replace(b'"baton_steps": 10', b'"baton_steps": 99') if damage is None else damage
    )
    second = durable(tmp_path, lines)
    assert len(lines) == 1 and FILE in lines[0] and "written anew" in lines[0]
    tell(second.metrics, attempt("b", 10, 12))
    assert samples(second)["baton_steps_total", ""] == 12, "the checkpoint proves the first ten"


def scraped(port: int) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return parsed(answer.read().decode())


@pytest.fixture
def port() -> Iterator[int]:
    yield free_port()


def wait_until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_end_waits_for_a_scraper_that_has_been_coming(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = RunMonitor("demo", str(tmp_path), "127.0.0.1", MetricsConfig(port=port))
    wait_until(lambda: f"http://127.0.0.1:{port}/metrics" in capsys.readouterr().out)
    monitor.attempt_started(1)
    assert scraped(port)["baton_run_state", "starting"] == 1
    for report in attempt("a", 0, 5):
        monitor.report(report)
    assert Figures.from_bytes((tmp_path / FILE).read_bytes(), "").counters["baton_checkpoints"] == 1, "at each commit"
    assert scraped(port)["baton_run_state", "running"] == 1
    closing = threading.Thread(target=monitor.close, args=(RunState.FINISHED,))
    closing.start()
    time.sleep(0.1)
    assert closing.is_alive(), "it has seen a scraper, and not since the run ended"
    last = scraped(port)
    assert last["baton_run_state", "finished"] == 1 and last["baton_run_state", "running"] == 0
    closing.join(5)
    assert not closing.is_alive()


def test_a_taken_port_is_named_and_taken_once_it_is_free(
    tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.run_monitor.KEEP_EVERY_S", 0.1)
    config = MetricsConfig(port=port, wait_for_last_scrape_s=0)
    first = RunMonitor("demo", str(tmp_path / "a"), "127.0.0.1", config)
    wait_until(lambda: "http://" in capsys.readouterr().out)
    second = RunMonitor("demo", str(tmp_path / "b"), "127.0.0.1", config)
    time.sleep(0.5)
    told = capsys.readouterr().out
    assert told.count(f"127.0.0.1:{port} can't be taken") == 1 and "metrics.port=" in told
    first.close(RunState.FINISHED)
    wait_until(lambda: "http://" in capsys.readouterr().out)
    second.attempt_started(3)
    assert scraped(port)["baton_restarts_total", ""] == 2
    second.close(RunState.FAILED)


def test_the_actor_needs_neither_torch_nor_ray() -> None:
    """It lives on the head node, where memory is scarce."""
    code = "import sys, cluster.run_monitor; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_how_long_the_end_waits() -> None:
    assert wait_for_last_scrape_s([], 60) == 0, "nobody ever came"
    assert wait_for_last_scrape_s([5.0], 60) == 60, "nobody knows how often it comes"
    assert 15 < wait_for_last_scrape_s([0.0, 10.0, 20.0], 60) < 20
    assert wait_for_last_scrape_s([0.0, 300.0], 60) == 60


def test_a_commit_is_reported_with_its_own_time_and_size() -> None:
    last = attempt("a", 0, 5)[-1].last_commit
    assert last is not None and last.committed_at == 1767225600.0, "2026-01-01T00:00:00Z"
    assert (last.step, last.size_bytes, last.seconds) == (5, 1000, 0.25)
