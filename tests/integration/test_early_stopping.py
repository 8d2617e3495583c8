"""A run that stops early is finished, and its count comes back with a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import finetune
from tests.integration.conftest import Workshop
from tests.support.command import RunFiles, run_here, write_config


@pytest.fixture(scope="module")
def config(workshop: Workshop) -> Path:
    """No loss is low enough to beat the first evaluation's, that of step 2."""
    values = workshop.values | {
        "evaluation": {"every_steps": 2, "patience": 3, "min_improvement": 100},
        "checkpoint": {"every_steps": 2, "keep_last": 1, "keep_best": 1},
    }
    values["training"] = workshop.values["training"] | {"steps": 12}
    return write_config(workshop.data, values, "early")


def test_the_count_comes_back_with_the_checkpoint(workshop: Workshop, config: Path) -> None:
    files = RunFiles(workshop.data / "runs" / "early")
    first = run_here(finetune.main, "--config", str(config), "evaluation.patience=1")
    told = "stopped early: step 2 had the lowest evaluation loss"
    assert first.code == 0 and f"finished: {told}" in first.output
    assert (files.result["status"], files.result["step"], files.result["num_steps"]) == ("finished", 4, 12)
    again = run_here(finetune.main, "--config", str(config), "evaluation.patience=1")
    assert again.code == 0 and f"the run is finished at step 4: {told}" in again.output
    assert files.result["attempts"] == 1 and told in files.result["reason"]

    longer = run_here(finetune.main, "--config", str(config))
    assert longer.code == 0 and "resuming from step 4" in longer.output, "a higher patience lets it go on"
    result = files.result
    assert (result["step"], result["best_eval_step"], result["evaluations_since_best"]) == (8, 2, 3)
    assert "none lower" in result["reason"] and max(files.steps()) == 8

    without = run_here(finetune.main, "--config", str(config), "evaluation.patience=null")
    assert without.code == 0 and files.result["step"] == 12 and files.result["reason"] == "all steps are done"
