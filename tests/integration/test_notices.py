"""Wishes that a run end: while it evaluates, by a file, with too little time. What is saved, and what goes on after."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch import finetune
from tests.integration.conftest import Workshop
from tests.support.command import Command, RunFiles, descendants, run_here, slowed_tree, write_config
from trainer.events import read_events
from trainer.run_directory import RunDirectory

EVERY = 7


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree whose steps take a tenth of a second more, and whose evaluations seconds."""
    tree = slowed_tree(tmp_path_factory.mktemp("slow"), 0.1)
    path = tree / "trainer" / "evaluate.py"
    line = "        batch = collate("
    text = path.read_text()
    assert text.count(line) == 1
    slower = f"        print('evaluating', flush=True); __import__('time').sleep(0.2)\n{line}"
    path.write_text(text.replace(line, slower))
    return tree


def values_of(workshop: Workshop, **sections: Any) -> dict[str, Any]:
    values = workshop.values | {
        "training": {"global_batch": 6, "micro_batch": 2, "steps": 40, "log_every": 1},
        "evaluation": {"every_steps": None},
        "checkpoint": {"every_steps": EVERY, "keep_last": 2},
        "export": {"at_end": False},
    }
    return values | sections


def events_of(files: RunFiles, number: int) -> dict[str, Any]:
    """Of an attempt, by kind: their details."""
    run = RunDirectory.at(str(files.path))
    return {event.kind: event.details for event in read_events(run, run.lineage()[number - 1].attempt)}


def carried_on(config: Path, *overrides: str) -> str:
    done = run_here(finetune.main, "--config", str(config), *overrides)
    assert done.code == 0, done.output
    return done.output


def stopped_in_an_evaluation(workshop: Workshop, slow: Path, name: str, steps: int) -> tuple[Path, RunFiles]:
    """A run that was told to stop in the evaluation after its fifth step."""
    # Of 60 rows, one at a time: long enough that whoever waits for its end is found out.
    data = workshop.values["data"] | {"validation": workshop.values["data"]["train"] + "#200"}
    values = values_of(workshop, data=data, evaluation={"every_steps": 5, "micro_batch": 1})
    values["training"] |= {"steps": steps}
    config = write_config(workshop.data, values, name)
    command = Command("finetune", "--config", str(config), tree=slow, cwd=slow.parent)
    command.wait_for(rf"step 5/{steps} [\s\S]*evaluating\n[\s\S]*evaluating")
    command.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert command.finish(60) == 75, command.output
    assert time.monotonic() - asked < 10
    assert "the evaluation of step 5 was given up" in command.output
    files = RunFiles(workshop.data / "runs" / name)
    assert files.result["step"] == 5 and events_of(files, 1)["saved"] == {"step": 5}
    assert files.result["eval_step"] != 5
    return config, files


def test_the_last_evaluation_is_made_up_too(workshop: Workshop, slow: Path) -> None:
    """No step is left to do, and the run is not finished."""
    config, files = stopped_in_an_evaluation(workshop, slow, "left-at-the-end", steps=5)
    said = carried_on(config)
    assert "resuming from step 5" in said and "finished: all steps are done" in said
    assert files.result["status"] == "finished" and files.result["eval_step"] == 5
    assert "the run is finished at step 5: all steps are done; nothing to do" in carried_on(config)


def test_an_evaluation_is_left_and_made_up(workshop: Workshop, slow: Path) -> None:
    config, _ = stopped_in_an_evaluation(workshop, slow, "left", steps=40)
    second = Command("finetune", "--config", str(config), tree=slow, cwd=slow.parent)
    second.wait_for(r"evaluat[\s\S]*step 6/40 ")
    before, _, _ = second.output.partition("step 6/40 ")
    second.kill()
    assert "evaluation after step 5: loss" in before, "it is made up before the next step"


def test_a_file_on_the_machine_stops_a_run_that_has_no_other(workshop: Workshop, slow: Path, tmp_path: Path) -> None:
    cluster = workshop.values["cluster"] | {"notice_file": str(tmp_path / "leaving")}
    config = write_config(workshop.data, values_of(workshop, cluster=cluster), "told")
    command = Command("finetune", "--config", str(config), tree=slow, cwd=slow.parent)
    step = EVERY + 3
    command.wait_for(f"step {step}/40 ")
    (tmp_path / "leaving").write_text("120")
    assert command.finish(60) == 75, command.output
    files = RunFiles(workshop.data / "runs" / "told")
    saved = events_of(files, 1)["saved"]["step"]
    assert files.result["step"] == saved >= step
    (tmp_path / "leaving").unlink()
    assert f"resuming from step {saved}" in carried_on(config)


def test_a_signal_to_all_of_its_processes_loses_no_step(workshop: Workshop, slow: Path) -> None:
    """As `ray job stop`, `timeout` and systemd send it."""
    config = write_config(workshop.data, values_of(workshop), "all-signalled")
    command = Command("finetune", "--config", str(config), tree=slow, cwd=slow.parent)
    step = EVERY + 3
    command.wait_for(f"step {step}/40 ")
    processes = [command.process.pid, *descendants(command.process.pid)]
    assert len(processes) >= 4, "with its fork server and two workers"
    for pid in reversed(processes):
        os.kill(pid, signal.SIGTERM)
    assert command.finish(60) == 75, command.output
    files = RunFiles(workshop.data / "runs" / "all-signalled")
    saved = events_of(files, 1)["saved"]["step"]
    assert files.result["step"] == saved >= step and saved == max(files.steps())
    assert f"resuming from step {saved}" in carried_on(config)


def test_no_save_is_begun_that_would_come_too_late(workshop: Workshop, slow: Path) -> None:
    """The grace is shorter than any save."""
    cluster = workshop.values["cluster"] | {"stop_grace_s": 0.0001}
    config = write_config(workshop.data, values_of(workshop, cluster=cluster), "hasty")
    command = Command("finetune", "--config", str(config), tree=slow, cwd=slow.parent)
    command.wait_for(f"step {EVERY + 3}/40 ")
    command.process.send_signal(signal.SIGTERM)
    assert command.finish(60) == 75, command.output
    files = RunFiles(workshop.data / "runs" / "hasty")
    events = events_of(files, 1)
    assert "saved" not in events and events["save_skipped"]["step"] >= EVERY + 3
    assert files.result["step"] % EVERY == 0 and files.result["step"] >= EVERY
    assert f"resuming from step {files.result['step']}" in carried_on(config)
    still = write_config(workshop.data, values_of(workshop), "hasty-not")
    carried_on(still)
    assert files.trace() == RunFiles(workshop.data / "runs" / "hasty-not").trace()
