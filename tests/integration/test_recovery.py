"""Promises 5, 7 and 8 through the command: killed workers, killed drivers, stops; every later loss bit-equal."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.conftest import Workshop
from tests.support.command import ROOT, Command, RunFiles, environment, run, write_config

STEPS = 40
Trace = list[tuple[float, float, int]]


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop) -> Trace:
    """The run that was left alone, without Ray."""
    config = write_config(workshop.data, workshop.values, "undisturbed")
    command = run("finetune", "--config", str(config))
    assert command.process.returncode == 0, command.output
    return RunFiles(workshop.data / "runs" / "undisturbed").trace()


def edited_tree(folder: Path) -> Path:
    """A copy of the working tree in which somebody changed code meanwhile."""
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", "*.egg-info", ".hypothesis")
    tree = shutil.copytree(ROOT, folder / "edited", ignore=ignored)
    with (tree / "trainer" / "loop.py").open("a") as file:
        file.write("\n# an edit that changes nothing\n")
    progress = tree / "trainer" / "progress_log.py"
    text = progress.read_text()
    assert "ETA {eta}" in text
    progress.write_text(text.replace("ETA {eta}", "ETA {eta} (edited)"))
    return tree


def kill_worker(command: Command, rank: int, after_step: int) -> int:
    """SIGKILL a worker once a step is logged. Returns its pid; fails unless it was alive and is gone."""
    command.wait_for(rf"step {after_step}/{STEPS} ")
    pids = re.findall(rf"worker rank {rank} of 2: pid (\d+)", command.output)
    pid = int(pids[-1])
    os.kill(pid, signal.SIGKILL)
    return pid


def test_killed_ray_worker_then_killed_driver_then_edited_tree(
    workshop: Workshop, undisturbed: Trace, tmp_path: Path
) -> None:
    """SIGKILL of a worker at a random step: the run goes on by itself. SIGKILL of the driver: the same command, given
    from an edited tree, ends it. All under Ray; every step equals the undisturbed run's, which ran without Ray."""
    rng = random.Random()
    worker_step, driver_step = rng.randrange(8, 14), rng.randrange(24, 34)
    rank = rng.randrange(2)
    print(f"killing rank {rank} after step {worker_step}, the driver after step {driver_step}")
    values = workshop.values | {"cluster": {"launcher": "ray", "num_workers": 2, "cpus_per_worker": 0.5}}
    config = write_config(workshop.data, values, "disturbed")
    files = RunFiles(workshop.data / "runs" / "disturbed")
    command = Command("finetune", "--config", str(config))
    try:
        kill_worker(command, rank, worker_step)
        command.wait_for(r"attempt 1 failed", timeout_s=90)
        resumed = int(command.wait_for(r"attempt 2 \(\w+\): resuming from step (\d+)")[1])
        assert resumed % 7 == 0 and resumed >= 7
        command.wait_for(rf"step {driver_step}/{STEPS} ", timeout_s=180)
        assert command.process.poll() is None, "the driver must be alive to be killed"
    finally:
        command.kill()
    time.sleep(3)  # Ray's own processes notice that their driver is gone
    again = run("finetune", "--config", str(config), tree=edited_tree(tmp_path), cwd=tmp_path)
    assert again.process.returncode == 0, again.output
    assert "(edited)" in again.output, "the edited tree's code must have run in the workers"
    assert int(re.search(r"attempt 3 \(\w+\): resuming from step (\d+)", again.output)[1]) >= resumed  # type: ignore[index]
    assert files.result["attempts"] == 3 and files.result["status"] == "finished"
    assert files.trace() == undisturbed


def test_sigterm_saves_and_the_same_command_resumes(workshop: Workshop, undisturbed: Trace) -> None:
    config = write_config(workshop.data, workshop.values, "stopped")
    files = RunFiles(workshop.data / "runs" / "stopped")
    command = Command("finetune", "--config", str(config))
    command.wait_for(rf"step 10/{STEPS} ")
    command.process.send_signal(signal.SIGTERM)
    assert command.finish() == 75, command.output
    stopped_at = files.result["step"]
    assert 10 <= stopped_at < STEPS and files.result["status"] == "stopped"
    refused = run("finetune", "--config", str(config), "optimizer.lr=2e-3", "seed=1")
    assert refused.process.returncode == 2
    assert "optimizer.lr: was 0.001, now 0.002" in refused.output and "seed: was 0, now 1" in refused.output
    assert "resume.allow=[optimizer.lr,seed]" in refused.output
    again = run("finetune", "--config", str(config))
    assert again.process.returncode == 0, again.output
    assert f"resuming from step {stopped_at}" in again.output
    assert files.trace() == undisturbed
    done = run("finetune", "--config", str(config))
    assert done.process.returncode == 0 and "the run is finished" in done.output
    assert files.result["attempts"] == 2, "a finished run starts no attempt"


def test_corrupt_checkpoints_are_named_and_left_out(workshop: Workshop) -> None:
    """A corrupt checkpoint is left out and the older one used; when none can be read, the run says so and ends."""
    config = write_config(workshop.data, workshop.values, "corrupt")
    files = RunFiles(workshop.data / "runs" / "corrupt")
    assert run("finetune", "--config", str(config), "training.steps=14").process.returncode == 0
    newest, older = (
        files.path / "checkpoints" / name
        for name in sorted(p.name for p in (files.path / "checkpoints").iterdir())[::-1]
    )
    victim = newest / "rank-00001.safetensors"
    damaged = bytearray(victim.read_bytes())
    damaged[-3] ^= 1
    victim.write_bytes(damaged)
    verify = run("checkpoints", "verify", str(files.path))
    assert verify.process.returncode == 1 and f"BAD   {newest.name}" in verify.output
    again = run("finetune", "--config", str(config), "training.steps=16")
    assert again.process.returncode == 0, again.output
    assert "CheckpointCorrupt" in again.output and "failed verification in this submission" in again.output
    assert f"resuming from step {int(older.name[:8])}" in again.output
    assert files.result["step"] == 16
    for path in files.path.glob("checkpoints/*/manifest.json"):
        path.write_bytes(path.read_bytes()[:100])
    lost = run("finetune", "--config", str(config), "training.steps=20")
    assert lost.process.returncode == 1, lost.output
    assert "none of its committed checkpoints can be used" in lost.output and "choose a new run.name" in lost.output


def test_torchrun_runs_the_same_loop(workshop: Workshop, undisturbed: Trace) -> None:
    """No Ray, no launcher of ours; and a new run begins with the weights of a finished one."""
    config = write_config(workshop.data, workshop.values, "elastic")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "launch" / "finetune.py"), "--config", str(config)]
    done = subprocess.run(
        [*torchrun, *script], env=environment(OMP_NUM_THREADS="1"), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    files = RunFiles(workshop.data / "runs" / "elastic")
    assert files.trace() == undisturbed
    heir = run("finetune", "--config", str(config), "run.name=heir", "training.steps=2", f"init_from={files.path}")
    assert heir.process.returncode == 0, heir.output
    recorded = json.loads((workshop.data / "runs" / "heir" / "run.json").read_text())
    newest = max(path.name for path in (files.path / "checkpoints").iterdir())
    assert recorded["init_from"] == f"{files.path}/checkpoints/{newest}", (
        "the source may go on; this run's start may not"
    )
    first_loss = RunFiles(workshop.data / "runs" / "heir").trace()[0][0]
    assert abs(first_loss - undisturbed[-1][0]) < 0.5 * abs(first_loss - undisturbed[0][0])
    nowhere = run("finetune", "--config", str(config), "run.name=orphan", f"init_from={files.path}@999")
    assert nowhere.process.returncode == 2 and "no such checkpoint; committed steps there: 35, 40" in nowhere.output
