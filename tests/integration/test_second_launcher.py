"""A second launcher through the command: refused while the first lives, in its place at once when it is dead, and able
to take the run over from one that can't be stopped. Every loss is the undisturbed run's."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.holder import process
from cluster.lease import holding
from launch import finetune
from tests.integration.conftest import Workshop
from tests.support.command import ROOT, Command, RunFiles, Trace, environment, run_here, write_config
from trainer.run_directory import RunDirectory
from trainer.survey import newest_usable

STEPS = 24


@pytest.fixture(scope="module")
def values(workshop: Workshop) -> dict[str, Any]:
    return workshop.values | {"training": {"global_batch": 6, "micro_batch": 2, "steps": STEPS}}


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop, values: dict[str, Any]) -> Trace:
    done = run_here(finetune.main, "--config", str(write_config(workshop.data, values, "alone")))
    assert done.code == 0, done.output
    files = RunFiles(workshop.data / "runs" / "alone")
    (claim,) = (files.path / "claims").glob("*.json")
    assert json.loads(claim.read_text())["state"] == "released"
    return files.trace()


def test_one_launcher_after_another(workshop: Workshop, values: dict[str, Any], undisturbed: Trace) -> None:
    """The first is killed, the second suspended; a third, while they live, is refused, and then takes over."""
    config = str(write_config(workshop.data, values, "contended"))
    files = RunFiles(workshop.data / "runs" / "contended")
    first = Command("finetune", "--config", config)
    try:
        first.wait_for(rf"step 3/{STEPS} ")
        began = time.monotonic()
        refused = run_here(finetune.main, "--config", config)
        assert time.monotonic() - began < 5, "a refusal must not take longer than a heartbeat"
        assert refused.code == 69, refused.output
        assert re.search(
            rf"contended is held by another launcher: \w+@\S+, pid {first.process.pid}, since \S+Z, last heartbeat "
            r"\S+Z\. Nothing was started\..*SIGTERM.*--take-over",
            refused.output,
        ), refused.output
        first.wait_for(rf"step 9/{STEPS} ")
        assert len(list((files.path / "attempts").iterdir())) == 1
    finally:
        first.kill()
    second = Command("finetune", "--config", config)
    try:
        second.wait_for(rf"carrying on in place of .* pid {first.process.pid}")
        second.wait_for(rf"step 16/{STEPS} ")
        assert "looking whether it is alive" not in second.output, "its pid is gone; nothing was to be waited for"
        assert re.search(r"attempt 2 \(\w+\): resuming from step 7,", second.output)
        second.process.send_signal(signal.SIGSTOP)  # its workers go on
        third = run_here(finetune.main, "--config", config, "--take-over")
        assert third.code == 0, third.output
        assert f"carrying on in place of {process(second.process.pid)}" in third.output and "attempt 3" in third.output
        second.process.send_signal(signal.SIGCONT)
        assert second.finish(60) == 69, second.output
    finally:
        second.kill()
    assert re.search(r"baton: the run was taken over by .*This launcher stops", second.output), second.output
    assert files.result["status"] == "finished" and files.result["attempts"] == 3
    assert files.trace() == undisturbed
    run = RunDirectory.at(str(files.path))
    chain = run.lineage()
    assert [start.term for start in chain] == [1, 2, 3]
    newest = newest_usable(run, lambda line: None)
    assert newest is not None and newest.manifest.attempt == chain[2].attempt


def test_torchrun_is_refused_too(workshop: Workshop, values: dict[str, Any]) -> None:
    """Rank 0 claims for all; and none of them trains."""
    config = write_config(workshop.data, values, "elastic-contended")
    files = RunFiles(workshop.data / "runs" / "elastic-contended")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "launch" / "finetune.py"), "--config", str(config)]
    with holding(RunDirectory.at(str(files.path)), print):
        done = subprocess.run(
            command, env=environment(OMP_NUM_THREADS="1"), text=True, capture_output=True, check=False, timeout=120
        )
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "held by another launcher" in said, said
    assert re.search(r"exitcode\s*: 69", said), said
    assert not (files.path / "attempts").exists()
