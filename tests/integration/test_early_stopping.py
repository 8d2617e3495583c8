"""A run that stops early is finished; what it needs for that comes back with a checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import finetune
from tests.integration.conftest import Workshop
from tests.support.command import ROOT, Command, RunFiles, environment, run_here, write_config


def early_run(workshop: Workshop, name: str, steps: int) -> tuple[Path, RunFiles]:
    """No loss is low enough to beat the first evaluation's, that of step 2."""
    values = workshop.values | {
        "evaluation": {"every_steps": 2, "patience": 3, "min_improvement": 100},
        "checkpoint": {"every_steps": 2, "keep_last": 1, "keep_best": 1},
        "training": workshop.values["training"] | {"steps": steps},
    }
    return write_config(workshop.data, values, name), RunFiles(workshop.data / "runs" / name)


def given(config: Path, *overrides: str) -> str:
    done = run_here(finetune.main, "--config", str(config), *overrides)
    assert done.code == 0, done.output
    return done.output


def test_the_count_comes_back_with_the_checkpoint(workshop: Workshop) -> None:
    config, files = early_run(workshop, "early", steps=12)
    told = "stopped early: 1 evaluation in a row not below"
    assert f"finished: {told}" in given(config, "evaluation.patience=1")
    assert (files.result["status"], files.result["step"], files.result["num_steps"]) == ("finished", 4, 12)
    assert f"the run is finished at step 4: {told}" in given(config, "evaluation.patience=1")
    assert files.result["attempts"] == 1 and told in files.result["reason"]

    assert "resuming from step 4" in given(config), "a higher patience lets it go on"
    assert (files.result["step"], files.result["evaluations_without_improvement"], max(files.steps())) == (8, 3, 8)

    given(config, "evaluation.patience=null")
    assert files.result["step"] == 12 and files.result["reason"] == "all steps are done"


@pytest.mark.parametrize(
    ("name", "overrides", "reason"),
    [
        ("made-up", ["evaluation.patience=1", "evaluation.every_steps={step}"], "stopped early"),
        ("beyond", ["evaluation.patience=null", "training.steps=2"], "all steps are done"),
    ],
)
def test_an_evaluation_that_is_made_up_may_end_the_run(
    workshop: Workshop, name: str, overrides: list[str], reason: str
) -> None:
    """It is saved, though no step was done; else the run would never be known to be finished. So is that of a run that
    is beyond what is now its last step."""
    config, files = early_run(workshop, name, steps=500)
    command = Command("finetune", "--config", str(config), "evaluation.patience=400")
    command.wait_for(r"evaluation after step 2[\s\S]*step 3/500 ")
    command.process.send_signal(signal.SIGTERM)
    assert command.finish() == 75, command.output
    step = files.result["step"]
    assert files.result["eval_step"] < step, "it is not evaluated where it was stopped"
    changes = [override.format(step=step) for override in overrides]
    assert f"resuming from step {step}" in given(config, *changes)
    assert (files.result["status"], files.result["step"], files.result["eval_step"]) == ("finished", step, step)
    assert reason in files.result["reason"]
    assert f"the run is finished at step {step}: {reason}" in given(config, *changes)


def test_under_torchrun_with_a_fast_tier_the_best_is_exported(workshop: Workshop, tmp_path: Path) -> None:
    config, files = early_run(workshop, "early-torchrun", steps=12)
    overrides = ["evaluation.patience=1", "export.at_end=true", "export.best=true"]
    overrides.append(f"checkpoint.fast={{path: {tmp_path / 'nvme'}, every_steps: 1}}")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "launch" / "finetune.py"), "--config", str(config), *overrides]
    done = subprocess.run(
        [*torchrun, *script], env=environment(OMP_NUM_THREADS="1"), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = files.result
    assert (result["status"], result["step"]) == ("finished", 4) and result["reason"].startswith("stopped early: ")
    best = f"step-{result['best_eval_step']:08d}"
    assert [
        (folder.name, (folder / "model" / "config.json").is_file()) for folder in (files.path / "export").iterdir()
    ] == [(best, True)]
