"""Promises 5, 7 and 8 through the command: stops, corrupt checkpoints, full disks, other launchers; every later loss
bit-equal.

Killed workers and drivers: test_disturbed_run.py.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import checkpoints, finetune
from tests.integration.conftest import Workshop
from tests.support.checkpoints import committed
from tests.support.command import ROOT, Command, RunFiles, Trace, environment, run_here, write_config
from tests.support.disk import disk_of, resize
from trainer.checkpoint import CheckpointRef
from trainer.run_directory import RunDirectory

STEPS = 40


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop) -> Trace:
    """The run that was left alone."""
    config = write_config(workshop.data, workshop.values, "undisturbed")
    done = run_here(finetune.main, "--config", str(config))
    assert done.code == 0, done.output
    return RunFiles(workshop.data / "runs" / "undisturbed").trace()


def test_sigterm_saves_and_the_same_command_resumes(workshop: Workshop, undisturbed: Trace) -> None:
    config = write_config(workshop.data, workshop.values, "stopped")
    files = RunFiles(workshop.data / "runs" / "stopped")
    command = Command("finetune", "--config", str(config))
    command.wait_for(rf"step 10/{STEPS} ")
    command.process.send_signal(signal.SIGTERM)
    assert command.finish() == 75, command.output
    stopped_at = files.result["step"]
    assert 10 <= stopped_at < STEPS and files.result["status"] == "stopped"
    refused = run_here(finetune.main, "--config", str(config), "optimizer.lr=2e-3", "seed=1")
    assert refused.code == 2
    assert "optimizer.lr: was 0.001, now 0.002" in refused.output and "seed: was 0, now 1" in refused.output
    assert "resume.allow=[optimizer.lr,seed]" in refused.output
    again = run_here(finetune.main, "--config", str(config))
    assert again.code == 0, again.output
    assert f"resuming from step {stopped_at}" in again.output
    assert files.trace() == undisturbed
    done = run_here(finetune.main, "--config", str(config))
    assert done.code == 0 and "the run is finished" in done.output
    assert files.result["attempts"] == 2, "a finished run starts no attempt"


def test_corrupt_checkpoints_are_named_and_left_out(workshop: Workshop) -> None:
    """A corrupt checkpoint is left out and the older one used; when none can be read, the run says so and ends."""
    config = write_config(workshop.data, workshop.values, "corrupt")
    files = RunFiles(workshop.data / "runs" / "corrupt")
    assert run_here(finetune.main, "--config", str(config), "training.steps=14").code == 0
    newest, older = (
        files.path / "checkpoints" / name
        for name in sorted(p.name for p in (files.path / "checkpoints").iterdir())[::-1]
    )
    victim = newest / "rank-00001.safetensors"
    damaged = bytearray(victim.read_bytes())
    damaged[-3] ^= 1
    victim.write_bytes(damaged)
    verify = run_here(checkpoints.main, "verify", str(files.path))
    assert verify.code == 1 and f"BAD   {newest.name}" in verify.output
    again = run_here(finetune.main, "--config", str(config), "training.steps=16")
    assert again.code == 0, again.output
    assert "CheckpointCorrupt" in again.output
    assert f"checkpoint {newest.name} is not used: checkpoint {newest.name}: quarantined" in again.output
    assert (newest / "quarantine.json").is_file() and victim.read_bytes() == damaged, "it is kept, for people"
    assert f"resuming from step {int(older.name[:8])}" in again.output
    assert files.result["step"] == 16
    for path in files.path.glob("checkpoints/*/manifest.json"):
        path.write_bytes(path.read_bytes()[:100])
    lost = run_here(finetune.main, "--config", str(config), "training.steps=20")
    assert lost.code == 1, lost.output
    assert "none of its committed checkpoints can be used" in lost.output and "choose a new run.name" in lost.output


def newest(run: Path) -> CheckpointRef:
    return committed(RunDirectory.at(str(run)).checkpoints)[-1]


def test_on_a_larger_disk_a_run_that_filled_one_goes_on(workshop: Workshop, undisturbed: Trace, tmp_path: Path) -> None:
    """The disk holds a checkpoint and a half."""
    wanted = newest(workshop.data / "runs" / "undisturbed")
    size = sum(file.size for file in wanted.manifest.files)
    with disk_of(tmp_path / "disk", size * 3 // 2) as disk:
        config = write_config(tmp_path, workshop.values | {"run": {"storage": str(disk)}}, "cramped")
        files = RunFiles(disk / "cramped")
        full = run_here(finetune.main, "--config", str(config))
        assert full.code == 75, full.output
        assert f"the disk of {files.path}/checkpoints is full" in full.output
        assert "Make room there" in full.output and "then give the same command again" in full.output
        assert files.result["status"] == "stopped" and files.result["step"] == 7 == newest(files.path).step
        resize(disk, size * 10)
        again = run_here(finetune.main, "--config", str(config))
        assert again.code == 0 and "resuming from step 7" in again.output, again.output
        assert files.trace() == undisturbed
        assert newest(files.path).manifest.files == wanted.manifest.files and newest(files.path).step == STEPS


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
    heir = run_here(
        finetune.main, "--config", str(config), "run.name=heir", "training.steps=2", f"init_from={files.path}"
    )
    assert heir.code == 0, heir.output
    recorded = json.loads((workshop.data / "runs" / "heir" / "run.json").read_text())
    newest = max(path.name for path in (files.path / "checkpoints").iterdir())
    assert recorded["init_from"] == f"{files.path}/checkpoints/{newest}", (
        "the source may go on; this run's start may not"
    )
    first_loss = RunFiles(workshop.data / "runs" / "heir").trace()[0][0]
    assert abs(first_loss - undisturbed[-1][0]) < 0.5 * abs(first_loss - undisturbed[0][0])
    nowhere = run_here(finetune.main, "--config", str(config), "run.name=orphan", f"init_from={files.path}@999")
    assert nowhere.code == 2 and "no such checkpoint; committed steps there: 35, 40" in nowhere.output
