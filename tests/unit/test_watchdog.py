"""When a worker hangs, and who is named for it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from data_shards.storage import Storage
from trainer.config import WatchdogConfig
from trainer.errors import BatonError
from trainer.hang import HangReport, Verdict, message, read_reports, verdict, write_report
from trainer.pulse import Phase, Pulse
from trainer.run_directory import RunDirectory, WorkerError
from trainer.watchdog import NoWatch, limit_s, open_watch

CONFIG = WatchdogConfig(factor=10, at_least_s=300, first_step_s=3600)


def report(rank: int, entered: int = 5, collectives: int | None = 40, phase: str = "data") -> HangReport:
    return HangReport(rank, f"node-{rank}", 7, phase, entered, collectives, 301.0, 2.5, 300.0)


def test_limit_follows_the_usual_step_but_never_the_odd_one() -> None:
    assert limit_s(CONFIG, Phase.STARTING, [], 600) == limit_s(CONFIG, Phase.DATA, [], 600) == 3600
    assert limit_s(CONFIG, Phase.DATA, [2.0] * 9, 600) == 300, "the floor"
    assert limit_s(CONFIG, Phase.DATA, [60.0] * 9 + [900.0] * 4, 600) == 600
    assert limit_s(CONFIG, Phase.EVALUATION, [60.0], 600) == 600
    assert limit_s(CONFIG, Phase.ENDING, [60.0], 3000) == 3300


def test_verdict_names_who_is_missing_else_who_did_least() -> None:
    assert verdict({0: report(0), 2: report(2)}, 4) == Verdict(missing=(1, 3), behind=())
    assert verdict({0: report(0), 1: report(1, collectives=39)}, 2).suspects == (1,)
    assert verdict({0: report(0), 1: report(1)}, 2).suspects == (), "all at the same place: nobody can tell"
    by_phase = {0: report(0, entered=6, collectives=None), 1: report(1, entered=5, collectives=None)}
    assert verdict(by_phase, 2).suspects == (1,)
    assert verdict({0: report(0)}, 1).suspects == ()
    both = verdict({0: report(0, collectives=39), 1: report(1)}, 3)
    assert both == Verdict(missing=(2,), behind=(0,)) and both.suspects == (2,)


def test_message_says_how_long_what_is_usual_who_and_which_knob() -> None:
    reports = {0: report(0, phase="forward_backward"), 1: report(1, collectives=39)}
    text = message(reports[0], verdict(reports, 2), reports, "/runs/a/stacks")
    for part in ("301 s", "step 7", "forward_backward", "2.5 s", "limit is 300 s", "watchdog.factor", "/runs/a/stacks"):
        assert part in text
    assert "wait for rank 1 on node-1 in data" in text
    many = message(reports[0], Verdict(tuple(range(1, 30)), ()), reports, "s")
    assert "Ranks 1, 2, 3, 4, 5, 6, 7, 8, … did not report" in many
    first = HangReport(0, "n", 1, "starting", 0, None, 3601.0, None, 3600.0)
    assert "watchdog.first_step_s" in message(first, Verdict((), ()), {0: first}, "s")


def test_half_a_report_counts_the_next_time(tmp_path: Path) -> None:
    attempt = Storage.at(tmp_path)
    assert read_reports(attempt) == {}
    write_report(attempt, report(1))
    attempt.write("hangs/rank-00000.json", [b'{"rank": 0, "no'])
    assert read_reports(attempt) == {1: report(1)}


def test_pulse_knows_phase_progress_and_seconds() -> None:
    pulse = Pulse()
    began = pulse.beat_at
    time.sleep(0.002)
    pulse.enter(Phase.DATA)
    assert pulse.beat_at == began, "another part of the same is no progress"
    pulse.begin_step(3)
    assert pulse.beat_at > began and pulse.phase == Phase.DATA and not pulse.step_seconds
    time.sleep(0.002)
    pulse.end_step()
    assert pulse.step == 3 and 0.002 <= pulse.step_seconds[-1] < 1 and pulse.num_entered == 3


@pytest.mark.parametrize("enabled", [True, False])
def test_a_worker_that_ends_leaves_no_trace_of_its_watch(tmp_path: Path, enabled: bool) -> None:
    run, pulse = RunDirectory.at(str(tmp_path)), Pulse()
    config = WatchdogConfig(enabled=enabled, first_step_s=0.5)
    watch = open_watch(config, run, "a1", pulse, rank=0, commit_timeout_s=1)
    assert isinstance(watch, NoWatch) != enabled
    assert (tmp_path / "attempts/a1/stacks/rank-00000.txt").exists() == enabled
    watch.close()
    watch.close()
    time.sleep(1)
    assert not (tmp_path / "attempts/a1/stacks").exists()


def test_errors_of_earlier_releases_are_read(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    error = WorkerError.of(1, BatonError("x"), step=4, suspects=(2, 3))
    run.write_error("a1", error)
    assert run.errors_of("a1") == [error]
