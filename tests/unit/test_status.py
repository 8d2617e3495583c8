"""`baton status`: what it reads of a run's folder, half there or damaged, and what it says."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.doing import FILE, Doing, DoingKind, write_doing
from cluster.lease import holding
from launch import status
from tests.support.command import run_here
from tests.unit.test_run_directory import commit
from trainer.errors import NonFiniteStep
from trainer.events import EventKind, EventLog
from trainer.progress_log import SO_FAR, ProgressLog
from trainer.run_directory import AttemptStart, RunDirectory, WorkerError, write_json
from trainer.step import StepResult
from trainer.survey import newest_usable

NOW = int(time.time())


def silent(line: str) -> None:
    pass


def begun(run: RunDirectory, parent: AttemptStart | None, at: int, claim: str = "", term: int = 1) -> AttemptStart:
    """An attempt that began so many seconds after the first."""
    start = run.start_attempt(parent, newest_usable(run, silent), (), term=term, claim=claim)
    written = asdict(start) | {"started": datetime.fromtimestamp(NOW - 1000 + at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")}
    write_json(run.attempt(start.attempt), "start.json", written)
    return start


def record(run: RunDirectory, attempt: str, first: int, last: int, at: int, name: str = "") -> None:
    """Steps of two seconds, as a commit leaves them."""
    lines = [
        json.dumps({"step": step, "num_steps": 50, "seconds": 2.0, "time": NOW - 1000 + at + 2 * (step - first + 1)})
        for step in range(first, last + 1)
    ]
    name = name or f"steps/{first:08d}-{last:08d}.jsonl"
    run.attempt(attempt).write(name, ["\n".join(lines).encode() + b"\n"])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Two attempts: one that went on beyond its last commit and failed, and one that was not heard of again."""
    run = RunDirectory.at(str(tmp_path / "mine"))
    write_json(run.storage, "run.json", {"config": {"cluster": {"num_workers": 4}, "training": {"steps": 60}}})
    first = begun(run, None, 0, "c1")
    record(run, first.attempt, 1, 10, 10)
    commit(run, first.attempt, 10)
    record(run, first.attempt, 11, 17, 30, SO_FAR)
    EventLog(run, first.attempt).record(EventKind.STARTED, "attempt 1 begins", num_workers=3)
    EventLog(run, first.attempt, rank=2).record(EventKind.HANG, "no step for 60 s", step=17)
    run.write_error(first.attempt, WorkerError.of(1, NonFiniteStep("the loss is nan")))
    decision = {
        "decision": {"action": "retry", "reason": "NonFiniteStep: the loss is nan"},
        "end": {"kind": "failed"},
        "at": datetime.fromtimestamp(NOW - 1000 + 50, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    write_json(run.attempt(first.attempt), "decision.json", decision)
    second = begun(run, first, 60, "c1")
    record(run, second.attempt, 11, 20, 70)
    commit(run, second.attempt, 20)
    return run


def as_json(*arguments: str) -> dict[str, Any]:
    done = run_here(status.main, *arguments, "--json")
    assert done.code == 0, done.output
    return json.loads(done.output)


def test_the_story_in_words(run: RunDirectory, tmp_path: Path) -> None:
    done = run_here(status.main, "mine", "--storage", str(tmp_path))
    assert done.code == 0
    lines = [" ".join(line.split()) for line in done.output.splitlines()]
    assert lines[0] == f"run {tmp_path}/mine"
    assert lines[1].startswith("interrupted: nobody holds it; the same command goes on")
    assert lines[2] == "step 20 of 50"
    assert lines[3].startswith("newest durable checkpoint: step 20, ")
    table = lines.index("attempt began (UTC) took workers steps lost ended")
    first, second = lines[table + 1 : table + 3]
    assert first.endswith(" 50s 3 0→17 7 (14s) failed: NonFiniteStep: the loss is nan"), first
    assert second.endswith(" 30s 1 10→20 - vanished: no word of its end: its launcher was killed or lost"), second
    assert any(line.endswith("hang attempt 1 rank 2: no step for 60 s") for line in lines)
    assert not any("attempt 1 begins" in line for line in lines)
    assert lines[-2] == "attempts 2, lost 7 steps (14s)"
    assert lines[-1].startswith(
        "goodput 44.4% of the 1m30s since the first attempt began: 40s in steps that count, 14s"
    )


def test_for_scripts(run: RunDirectory, tmp_path: Path) -> None:
    told = as_json(str(tmp_path / "mine"))
    assert told["num_steps"] == 50 and told["held_by"] is None and told["durable"]["step"] == 20
    assert told["story"]["state"] == "interrupted" and told["story"]["step"] == 20
    assert [attempt["lost_steps"] for attempt in told["story"]["attempts"]] == [7, 0]
    assert {event["kind"] for event in told["story"]["events"]} == {"started", "hang"}
    totals = told["story"]["totals"]
    assert totals["elapsed_s"] == 90.0 and totals["goodput"] == pytest.approx(40 / 90)


def test_while_it_is_held(run: RunDirectory, tmp_path: Path) -> None:
    with holding(run, silent) as lease:
        assert as_json(str(tmp_path / "mine"))["story"]["state"] == "preparing"
        begun(run, run.lineage()[-1], 900, lease.id, lease.term)
        told = as_json(str(tmp_path / "mine"))
    assert told["story"]["state"] == "starting" and len(told["story"]["attempts"]) == 3
    assert told["story"]["totals"]["elapsed_s"] >= 1000
    assert f"since {lease._mine.since}" in told["held_by"] and not told["silent"]


def test_a_launcher_that_waits_for_room_is_told(run: RunDirectory, tmp_path: Path) -> None:
    since = time.time() - 130
    with holding(run, silent) as lease:
        write_doing(run, Doing(DoingKind.WAITING, since, "waiting for room:\n8 GPUs", lease.id))
        done = run_here(status.main, str(tmp_path / "mine"))
        told = as_json(str(tmp_path / "mine"))["story"]
    lines = done.output.splitlines()
    assert lines[1].startswith("waiting: held by ")
    began = datetime.fromtimestamp(since, UTC).strftime("%Y-%m-%d %H:%M:%S")
    assert re.fullmatch(rf"since {began} \(2m\d+s\): waiting for room: 8 GPUs", lines[2]), lines[2]
    assert told["state"] == told["doing"]["kind"] == "waiting" and told["doing"]["since"] == since
    assert as_json(str(tmp_path / "mine"))["story"]["doing"] is None, "nobody holds it"


def test_an_end_that_was_written(run: RunDirectory, tmp_path: Path) -> None:
    result = {"status": "stopped", "reason": "stopped on request; step 20 is saved", "attempts": 2, "written": "then"}
    write_json(run.storage, "result.json", result)
    done = run_here(status.main, str(tmp_path / "mine"))
    assert "stopped then: stopped on request; step 20 is saved" in done.output


def test_files_that_are_half_there(run: RunDirectory, tmp_path: Path) -> None:
    attempt = run.lineage()[-1].attempt
    folder = tmp_path / "mine" / "attempts" / attempt
    for name in ("decision.json", "end.json", "steps/00000021-00000022.jsonl", "events/x.json", "errors/rank-0.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"step": 2')
    (tmp_path / "mine" / "result.json").write_text("")
    (tmp_path / "mine" / "run.json").write_text("{")
    (tmp_path / "mine" / FILE).write_text('{"kind": "wai')
    (tmp_path / "mine" / "attempts" / "empty").mkdir()
    told = as_json(str(tmp_path / "mine"))
    assert told["story"]["step"] == 20 and len(told["story"]["attempts"]) == 2


def test_a_run_that_is_being_prepared(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path / "new"))
    with holding(run, silent):
        done = run_here(status.main, str(tmp_path / "new"))
    assert done.code == 0 and "preparing: held by" in done.output and "step 0 of a number not known yet" in done.output
    assert run_here(status.main, str(tmp_path / "new")).code == 2, "nothing came of it"


def test_what_is_many_is_cut(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    write_json(run.storage, "run.json", {})
    parent = None
    for number in range(20):
        parent = begun(run, parent, number)
        EventLog(run, parent.attempt).record(EventKind.NOTICE, f"notice {number}")
    done = run_here(status.main, str(tmp_path))
    assert "… 5 earlier attempts (--all)" in done.output and "… 5 earlier events (--all)" in done.output
    assert "notice 4" not in done.output and "notice 5" in done.output
    full = run_here(status.main, str(tmp_path), "--all")
    assert "earlier" not in full.output and "notice 4" in full.output


def result_of_step(loss: float = 1.0) -> StepResult:
    known = dict.fromkeys(StepResult._fields, 0)
    return StepResult(**known | {"loss": loss, "seconds_by_part": {}})


def steps_so_far(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_steps_are_told_before_their_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with each step; also where no step follows; and what a commit has written is not written again."""
    monkeypatch.setattr("trainer.progress_log.SO_FAR_EVERY_S", 0.5)
    run = RunDirectory.at(str(tmp_path))
    write_json(run.storage, "run.json", {})
    start = run.start_attempt(None, None, ())
    log = ProgressLog(run.attempt(start.attempt), 9, 100, enabled=True)
    so_far = tmp_path / "attempts" / start.attempt / SO_FAR
    for step in (1, 2):
        log.step(step, result_of_step(), 1e-3, 0.5)
    assert steps_so_far(so_far) == []
    time.sleep(0.8)
    assert steps_so_far(so_far) == [1, 2]
    assert as_json(str(tmp_path))["story"]["attempts"][0]["to_step"] == 2
    log.step(3, result_of_step(), 1e-3, 0.5)
    log.flushing()()
    time.sleep(0.8)
    assert steps_so_far(so_far) == [1, 2], "nothing was left to write"
    log.step(4, result_of_step(), 1e-3, 0.5)
    time.sleep(0.3)
    log.flushing()()
    time.sleep(0.1)
    log.step(5, result_of_step(), 1e-3, 0.5)
    time.sleep(0.3)
    assert steps_so_far(so_far) == [1, 2], "a commit puts it off"
    time.sleep(0.5)
    assert steps_so_far(so_far) == [5]
    told = as_json(str(tmp_path))
    assert told["num_steps"] == 9 and told["story"]["attempts"][0]["to_step"] == 5
