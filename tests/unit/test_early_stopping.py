"""Which evaluation was the best, and when a run has waited long enough for a better one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.errors import BadInput
from launch.config import load_config
from launch.places import checkpoint_to_export
from tests.unit.test_run_directory import commit
from trainer.checkpoint_manifest import Progress
from trainer.config import EvaluationConfig
from trainer.early_stopping import after_evaluation, ended_early
from trainer.run_directory import RunDirectory

CONFIG = """
model: {base: b}
data: {train: t.jsonl, validation: v.jsonl}
training: {global_batch: 2, steps: 3}
"""


def evaluated(losses: list[float], config: EvaluationConfig) -> list[Progress]:
    """Every ten steps, to the end."""
    found = [Progress()]
    for number, loss in enumerate(losses, 1):
        found.append(after_evaluation(replace(found[-1], step=10 * number), loss, config))
    return found[1:]


@pytest.mark.parametrize(
    ("losses", "patience", "min_improvement", "ends_at"),
    [
        ([3, 2, 1, 1.5, 1.2, 1.1], 3, 0.0, 60),
        ([3, 2, 2, 1.9, 2, 2], 2, 0.0, 60),  # the same again is not lower; a lower one begins the count anew
        ([3, 2.9, 2.8, 2.7], 3, 0.5, 40),  # each a little lower, and none by enough
        ([3, 2.4, 1.8, 1.2], 1, 0.5, None),
        ([1, 2, 3, 4, 5], None, 0.0, None),
        ([1, 2], 1, 0.0, 20),
    ],
)
def test_it_ends_after_so_many_evaluations_without_a_lower_loss(
    losses: list[float], patience: int | None, min_improvement: float, ends_at: int | None
) -> None:
    config = EvaluationConfig(every_steps=10, patience=patience, min_improvement=min_improvement)
    ends = [progress.step for progress in evaluated(losses, config) if ended_early(progress, config)]
    assert ends[:1] == ([ends_at] if ends_at else [])


def test_the_best_is_told() -> None:
    config = EvaluationConfig(every_steps=10, patience=2)
    last = evaluated([3, 1.25, 2, 1.5], config)[-1]
    assert (last.best_eval_loss, last.best_eval_step, last.evaluations_since_best) == (1.25, 20, 2)
    assert (last.first_eval_loss, last.eval_loss, last.eval_step) == (3, 1.5, 40)
    reason = (
        "stopped early: step 20 had the lowest evaluation loss, 1.2500, and 2 evaluations since then had none lower"
    )
    assert ended_early(last, config) == reason


def test_a_patience_that_was_lowered_waits_for_the_next_evaluation() -> None:
    """The steps since the last one are not thrown away, and the run ends with an evaluation of its own step."""
    config = EvaluationConfig(every_steps=10, patience=1)
    behind = replace(evaluated([1, 2, 3], EvaluationConfig(every_steps=10, patience=5))[-1], step=33)
    assert not ended_early(behind, config)
    assert ended_early(after_evaluation(replace(behind, step=40), 2.0, config), config)


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("evaluation={patience: 2}", "patience=2 needs every_steps"),
        ("evaluation={patience: 2, every_steps: 5}", "evaluation.patience=2 needs held-out records"),
        ("export.best=true", "export.best=true needs checkpoint.keep_best=1"),
    ],
)
def test_what_it_needs_is_named(tmp_path: Path, override: str, named: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    overrides = [override, *(["data.validation=[]"] if "every_steps" in override else [])]
    with pytest.raises(BadInput, match=named):
        load_config(str(path), overrides)


def test_the_best_is_exported(tmp_path: Path) -> None:
    """Of those that were evaluated at their own step; the newest is another."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    config = load_config(str(path), ["export.best=true", "checkpoint.keep_best=1"])
    run = RunDirectory.at(str(tmp_path / "run"))
    attempt = run.start_attempt(None, None, ()).attempt
    commit(run, attempt, 10, eval_loss=0.5, eval_step=9)
    with pytest.raises(BadInput, match="no checkpoint that was evaluated at its own step"):
        checkpoint_to_export(config, run)
    for step, loss in ((20, 2.0), (30, 1.0), (40, 3.0)):
        commit(run, attempt, step, eval_loss=loss, eval_step=step)
    assert checkpoint_to_export(config, run).step == 30
    assert checkpoint_to_export(config, run, 20).step == 20, "what is asked for by its step"
    assert checkpoint_to_export(load_config(str(path)), run).step == 40
