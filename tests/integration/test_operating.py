"""A run from its operator's side: told while it trains, stopped from elsewhere, told again, gone on with, told at its
end. And nothing secret in whatever it leaves."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.holder import this_process
from cluster.lease import World, take
from launch import finetune, job, status, stop
from tests.integration.conftest import Workshop
from tests.support.command import Command, Ended, RunFiles, environment, run_here, slowed_tree, write_config
from tests.support.secrets_search import leaks
from trainer.run_directory import RunDirectory

STEPS = 24
PLANTED = {name: f"planted-{secrets.token_hex(16)}" for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")}
"""Secrets in the environment of the launchers, and with it of their workers."""


@dataclass(frozen=True)
class Operated:
    files: RunFiles
    training: dict[str, Any]
    """what ``baton status`` says while it trains"""
    stop: Ended
    stop_s: float
    stopped_code: int
    """of the launcher that was asked"""
    stopped: str
    finished: dict[str, Any]
    text: str
    """of the end"""
    output: str
    """of both launchers and their workers"""


def told(config: str) -> dict[str, Any]:
    done = run_here(status.main, "--config", config, "--json")
    assert done.code == 0, done.output
    return json.loads(done.output)


@pytest.fixture(scope="module")
def operated(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    values = workshop.values | {"training": {"global_batch": 6, "micro_batch": 2, "steps": STEPS}}
    config = str(write_config(workshop.data, values, "operated"))
    tree = slowed_tree(tmp_path_factory.mktemp("trees"), 0.5)
    first = Command("finetune", "--config", config, tree=tree, **PLANTED)
    try:
        first.wait_for(rf"step 9/{STEPS} ")
        training = told(config)
        began = time.monotonic()
        stopping = run_here(stop.main, "--config", config)
        stop_s = time.monotonic() - began
        code = first.finish(60)
        stopped = run_here(status.main, "--config", config).output
    finally:
        first.kill()
    second = Command("finetune", "--config", config, **PLANTED)
    try:
        assert second.finish() == 0, second.output
    finally:
        second.kill()
    text = run_here(status.main, "--config", config).output
    files = RunFiles(workshop.data / "runs" / "operated")
    output = f"{first.output}\n{second.output}"
    yield Operated(files, training, stopping, stop_s, code, stopped, told(config), text, output)


def test_it_is_told_while_it_trains(operated: Operated) -> None:
    (attempt,) = operated.training["story"]["attempts"]
    assert operated.training["story"]["state"] == "training" and attempt["state"] == "running"
    assert operated.training["num_steps"] == STEPS and operated.training["durable"]["step"] == 7
    assert 7 <= operated.training["story"]["step"] < STEPS


def test_it_is_stopped_from_elsewhere(operated: Operated) -> None:
    assert operated.stop.code == 0, operated.stop.output
    assert operated.stopped_code == 75
    assert "baton stop): asking the workers to save and stop" in operated.output
    assert operated.stop_s < 30, "a heartbeat, a step, a save"
    step = operated.finished["story"]["attempts"][0]["to_step"]
    assert 9 <= step < STEPS
    assert f"stopped at step {step}: stopped on request; step {step} is saved" in operated.stop.output
    assert f"stopped on request; step {step} is saved" in operated.stopped


def test_it_is_told_at_its_end(operated: Operated) -> None:
    story = operated.finished["story"]
    first, second = story["attempts"]
    assert story["state"] == "finished" and story["step"] == STEPS
    assert (first["state"], second["state"]) == ("stopped", "finished")
    assert first["to_step"] == second["from_step"] and second["to_step"] == STEPS
    assert first["lost_steps"] == second["lost_steps"] == 0
    records = operated.files.steps()
    totals = story["totals"]
    assert sorted(records) == list(range(1, STEPS + 1))
    assert totals["kept_s"] == pytest.approx(sum(record["seconds"] for record in records.values()))
    assert 0 < totals["goodput"] < 1 and totals["idle_s"] > 0
    assert f"step {STEPS} of {STEPS}" in operated.text and "goodput" in operated.text


def test_an_export_is_told(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command that has trained, and by a later one that makes up for what is not there."""
    values = workshop.values | {"training": workshop.values["training"] | {"steps": 2}, "export": {"at_end": True}}
    config = write_config(workshop.data, values, "exported")
    folder = workshop.data / "runs" / "exported"
    seen: list[status.Told] = []
    monkeypatch.setattr(job, "export_run", lambda *_, **__: seen.append(status.look(RunDirectory.at(str(folder)))))
    for _ in range(2):
        done = run_here(finetune.main, "--config", str(config))
        assert done.code == 0, done.output
    assert told(str(config))["story"]["state"] == "finished"
    for look in seen:
        story = look.story
        assert story.state == "exporting" and story.attempts[0].state == "finished"
        assert story.doing is not None and story.doing.text == f"step 2 to {folder}/export/step-00000002"
        assert look.now - story.doing.since < 30, "since it began"
    first, second = seen
    assert first.story.totals == second.story.totals, "it is not charged to the training"
    assert first.held_by != second.held_by


def test_nothing_is_left_to_stop(operated: Operated) -> None:
    done = run_here(stop.main, str(operated.files.path))
    assert done.code == 2 and "nobody holds the run" in done.output


def test_under_torchrun_too(workshop: Workshop, tmp_path: Path) -> None:
    config = str(write_config(workshop.data, workshop.values, "elastic-stopped"))
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "1"]
    script = str(slowed_tree(tmp_path, 0.5) / "launch" / "finetune.py")
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*torchrun, script, "--config", config],
            env=environment(OMP_NUM_THREADS="1"),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 120
        while "step 1/" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        done = run_here(stop.main, "--config", config)
        assert done.code == 0 and "stopped at step " in done.output, done.output + log.read_text()
        process.wait(60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
    assert told(config)["story"]["state"] == "stopped"


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_signals_before_there_is_anything_to_save(workshop: Workshop, signum: signal.Signals, code: int) -> None:
    """Here while it looks whether another machine's launcher lives."""
    config = str(write_config(workshop.data, workshop.values, f"signalled-{code}"))
    run = RunDirectory.at(str(workshop.data / "runs" / f"signalled-{code}"))
    elsewhere = replace(this_process(), host="elsewhere", place="another boot")
    take(run, lambda line: None, world=World(me=lambda: elsewhere))
    command = Command("finetune", "--config", config)
    try:
        command.wait_for("the run is held by .*@elsewhere.* looking whether it is alive")
        command.process.send_signal(signum)
        assert command.finish(30) == code, command.output
    finally:
        command.kill()
    assert "Traceback" not in command.output
    assert ("baton: interrupted; nothing committed is lost" in command.output) == (signum == signal.SIGINT)


def test_secrets_of_the_environment_stay_there(operated: Operated) -> None:
    """Not in what the run leaves, not in what its processes say, not in what is told of it."""
    storage = operated.files.path.parent
    assert leaks(storage, PLANTED) == []
    told = "\n".join([operated.output, operated.text, operated.stopped, json.dumps(operated.finished)])
    assert [name for name, value in PLANTED.items() if value in told] == []
    (operated.files.path / "attempts" / "planted").write_text(f"token={PLANTED['HF_TOKEN']}")
    try:
        assert leaks(storage, PLANTED) == ["operated/attempts/planted: HF_TOKEN"], "it would have been found"
    finally:
        (operated.files.path / "attempts" / "planted").unlink()
