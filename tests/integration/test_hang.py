"""Faults 4, 5 and 10 of a run: a worker that is stopped, blocked or elsewhere is named, and the run goes on."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from launch import finetune
from tests.integration.conftest import Workshop
from tests.support.chaos import saves_end_before_the_next_step
from tests.support.command import Command, RunFiles, Trace, run_here, slowed_tree, write_config
from tests.support.worker_faults import Fault, install
from trainer.events import EventKind, read_events
from trainer.run_directory import RunDirectory

STEPS, EVERY, AT = 12, 3, 7
LIMIT_S = 4.0


@pytest.fixture(scope="module")
def values(workshop: Workshop) -> dict[str, Any]:
    return workshop.values | {
        "training": {"global_batch": 4, "micro_batch": 2, "steps": STEPS},
        "checkpoint": {"every_steps": EVERY},
        "watchdog": {"at_least_s": LIMIT_S, "first_step_s": 120},
    }


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop, values: dict[str, Any]) -> RunFiles:
    config = write_config(workshop.data, values, "not-hung")
    done = run_here(finetune.main, "--config", str(config))
    assert done.code == 0, done.output
    files = RunFiles(workshop.data / "runs" / "not-hung")
    assert not list(files.path.glob("attempts/*/stacks")), "a run that is well leaves none"
    return files


def weights(files: RunFiles) -> dict[str, bytes]:
    (newest,) = [path for path in (files.path / "checkpoints").iterdir() if path.name.startswith(f"{STEPS:08d}")]
    return {path.name: path.read_bytes() for path in newest.glob("rank-*.safetensors")}


def attempts(files: RunFiles) -> list[Path]:
    return sorted(
        files.path.glob("attempts/*"), key=lambda path: json.loads((path / "start.json").read_text())["number"]
    )


@pytest.mark.parametrize(
    ("fault", "function", "named"),
    [
        (Fault.STOPPED, None, r"Rank 1 did not report"),
        (Fault.HOLDS_INTERPRETER, "_hold_the_interpreter", r"Rank 1 did not report"),
        (Fault.NEVER_JOINS, "_never_joins", r"The others wait for rank 1 on \S+ in data"),
    ],
)
def test_a_hang_is_named_and_the_run_goes_on(
    workshop: Workshop,
    values: dict[str, Any],
    undisturbed: RunFiles,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    fault: Fault,
    function: str | None,
    named: str,
) -> None:
    mark = tmp_path / "fired"
    install(monkeypatch, fault, mark, rank=1, step=AT)
    saves_end_before_the_next_step(monkeypatch.setattr)  # however busy the machine
    config = write_config(workshop.data, values, f"hung-{fault.value}")
    done = run_here(finetune.main, "--config", str(config))
    print(done.output)
    assert mark.exists(), "the fault must fire"
    assert done.code == 0, done.output
    files = RunFiles(workshop.data / "runs" / f"hung-{fault.value}")
    first, second = attempts(files)
    decision = json.loads((first / "decision.json").read_text())
    error = decision["end"]["error"]
    assert error["type"] == "Hang" and error["suspects"] == [1] and error["step"] == AT + 1
    assert re.search(named, error["message"]) and re.search(r"no progress for \d+ s in step 8", error["message"])
    assert json.loads((second / "start.json").read_text())["start_step"] == AT // EVERY * EVERY
    stacks = {path.name: path.read_text() for path in (first / "stacks").iterdir()}
    assert "train_step" in stacks["rank-00000.txt"] or "disturbed" in stacks["rank-00000.txt"]
    if function is not None:
        assert f" in {function}" in stacks["rank-00001.txt"]
    events = [e for e in read_events(RunDirectory.at(str(files.path)), first.name) if e.kind == EventKind.HANG]
    assert len(events) == 1 and events[0].text == error["message"]
    assert files.trace() == undisturbed.trace() and weights(files) == weights(undisturbed)


def test_a_slow_evaluation_is_no_hang(
    workshop: Workshop,
    values: dict[str, Any],
    undisturbed: RunFiles,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """It takes longer than the limit, but its micro batches come one by one."""
    mark = tmp_path / "fired"
    install(monkeypatch, Fault.SLOW_EVALUATION, mark, rank=None)
    limits = {"watchdog": {"at_least_s": 1.2, "first_step_s": 120}, "evaluation": {"micro_batch": 1}}
    config = write_config(workshop.data, values | limits, "slow-evaluation")
    done = run_here(finetune.main, "--config", str(config))
    assert done.code == 0, done.output
    assert len(mark.read_text()) // 2 * 0.5 > 2 * 1.2, "it must have taken longer than the limit"
    files = RunFiles(workshop.data / "runs" / "slow-evaluation")
    trace: Trace = files.trace()
    assert len(attempts(files)) == 1 and trace == undisturbed.trace()


def is_running(pid: int) -> bool:
    """Or stopped: it holds memory; a zombie holds none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_thread_that_does_not_end_keeps_no_run(
    workshop: Workshop, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All is done then: a process that stays would keep the command, its GPU, and the export from beginning."""
    mark = tmp_path / "fired"
    install(monkeypatch, Fault.NEVER_ENDS, mark, rank=1, step=AT)
    config = write_config(workshop.data, values, "never-ends")
    done = run_here(finetune.main, "--config", str(config))
    assert mark.exists() and done.code == 0 and "finished: all steps are done" in done.output, done.output


def test_under_ray_a_stopped_worker_does_not_stay(
    workshop: Workshop, values: dict[str, Any], undisturbed: RunFiles, tmp_path: Path
) -> None:
    """Else it would hold its GPU's memory, and the next attempt find none."""
    ray = {"launcher": "ray", "num_workers": 2, "cpus_per_worker": 0.5}
    config = write_config(workshop.data, values | {"cluster": ray, "metrics": {"port": 0}}, "hung-ray")
    command = Command("finetune", "--config", str(config), tree=slowed_tree(tmp_path, 0.3), cwd=tmp_path)
    try:
        command.wait_for(rf"step {AT}/{STEPS} ")
        pid = int(command.wait_for(r"worker rank 1 of 2: pid (\d+)")[1])  # Ray passes lines on when it likes
        os.kill(pid, signal.SIGSTOP)
        command.wait_for(r"attempt 1 failed \(Hang: .*Rank 1 did not report", timeout_s=90)
        command.wait_for(r"attempt 2 \(\w+\): resuming from step [\s\S]* step \d+/", timeout_s=90)
        assert not is_running(pid)
        assert command.finish() == 0, command.output
    finally:
        command.kill()
    assert RunFiles(workshop.data / "runs" / "hung-ray").trace() == undisturbed.trace()
