"""Status and stop of a run on S3, from a machine that sees nothing of its launcher but the bucket."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster.holder import this_process
from cluster.lease import World, take
from launch import status, stop
from tests.support.command import run_here
from tests.support.object_store import CREDENTIALS, S3Server, create_bucket, s3_uri
from tests.unit.test_run_directory import commit
from tests.unit.test_status import record
from trainer.events import EventKind, EventLog
from trainer.run_directory import RunDirectory, write_json
from trainer.survey import newest_usable

BEAT_S = 0.5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a folder of runs."""
    with pytest.MonkeyPatch.context() as patch, S3Server(tmp_path_factory.mktemp("s3") / "server.log") as server:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        create_bucket(server.port, "baton")
        yield s3_uri("baton", "runs", server.port)


def test_told_and_stopped(runs: str) -> None:
    place, _, options = runs.partition("?")
    run = RunDirectory.at(f"{place}/mine?{options}")
    write_json(run.storage, "run.json", {"config": {"training": {"steps": 20}}})
    elsewhere = replace(this_process(), host="elsewhere", place="another boot")
    lease = take(run, print, world=World(me=lambda: elsewhere))
    first = run.start_attempt(None, None, (), term=lease.term, claim=lease.id)
    record(run, first.attempt, 1, 10, 0)
    commit(run, first.attempt, 10)
    EventLog(run, first.attempt).record(EventKind.NOTICE, "the machine goes away")
    run.start_attempt(first, newest_usable(run), (), term=lease.term, claim=lease.id)
    silent = run_here(status.main, "mine", "--storage", runs)
    assert silent.code == 0 and "It is silent: perhaps dead" in silent.output, silent.output

    lease.keep(BEAT_S)
    began = time.monotonic()
    done = run_here(status.main, "mine", "--storage", runs, "--json")
    assert done.code == 0, done.output
    assert time.monotonic() - began < 8, "once its heartbeat has changed, it is alive"
    told = json.loads(done.output)
    assert "elsewhere" in told["held_by"] and not told["silent"] and told["num_steps"] == 50
    assert told["story"]["state"] == "starting" and told["durable"]["step"] == 10
    assert [attempt["kept_steps"] for attempt in told["story"]["attempts"]] == [10, 0]
    assert [event["text"] for event in told["story"]["events"]] == ["the machine goes away"]

    asked: list[str] = []

    def end(reason: str) -> None:
        asked.append(reason)
        written = {"status": "stopped", "step": 10, "reason": "stopped on request; step 10 is saved", "attempts": 2}
        write_json(run.storage, "result.json", written)
        lease.release()

    lease.when_asked_to_stop(end)
    stopped = run_here(stop.main, "mine", "--storage", runs)
    assert stopped.code == 0 and "stopped at step 10: stopped on request" in stopped.output, stopped.output
    assert len(asked) == 1 and asked[0].endswith("(baton stop)")
    ended = run_here(status.main, "mine", "--storage", runs)
    assert "\nstopped " in ended.output and "nobody" not in ended.output
