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
from trainer.evaluations import after_evaluation, ended_early, is_missing, is_over
from trainer.run_directory import RunDirectory

CONFIG = """
model: {base: b}
data: {train: t.jsonl, validation: v.jsonl}
training: {global_batch: 2, steps: 3}
"""


STEPS = 1000


def evaluated(losses: list[float], config: EvaluationConfig, begin: Progress | None = None) -> list[Progress]:
    """Every ten steps, to the end."""
    found = [begin or Progress()]
    for loss in losses:
        found.append(after_evaluation(replace(found[-1], step=found[-1].step + 10), loss, config))
    return found[1:]


@pytest.mark.parametrize(
    ("losses", "patience", "min_improvement", "ends_at"),
    [
        ([3, 2, 1, 1.5, 1.2, 1.1], 3, 0.0, 60),
        ([3, 2, 2, 1.9, 2, 2], 2, 0.0, 60),  # the same again is no improvement; a lower one begins the count anew
        ([3, 2.9, 2.8, 2.7], 3, 0.5, 40),  # each a little lower, and none by enough
        ([3, 2.8, 2.4, 2.2, 1.8], 2, 0.5, None),  # little by little enough
        ([1, 2, 3, 4, 5], None, 0.0, None),
        ([1, 2], 1, 0.0, 20),
    ],
)
def test_it_ends_after_so_many_evaluations_without_improvement(
    losses: list[float], patience: int | None, min_improvement: float, ends_at: int | None
) -> None:
    config = EvaluationConfig(every_steps=10, patience=patience, min_improvement=min_improvement)
    ends = [progress.step for progress in evaluated(losses, config) if is_over(progress, config, STEPS)]
    assert ends[:1] == ([ends_at] if ends_at else [])


def test_the_best_is_told() -> None:
    """The lowest of all is the best, though it may be no improvement."""
    config = EvaluationConfig(every_steps=10, patience=2, min_improvement=0.5)
    last = evaluated([3, 1.25, 1, 1.5], config)[-1]
    assert (last.best_eval_loss, last.best_eval_step, last.evaluations_without_improvement) == (1, 30, 2)
    assert (last.first_eval_loss, last.eval_loss, last.eval_step) == (3, 1.5, 40)
    assert ended_early(last, config, STEPS) == (
        "stopped early: 2 evaluations in a row not below 1.2500 by more than 0.5; "
        "the lowest, 1.0000, was that of step 30"
    )
    assert is_over(last, config, 40) and not ended_early(last, config, 40), "its last step is its end anyway"


def test_a_patience_that_was_lowered_waits_for_the_next_evaluation() -> None:
    """The steps since the last one are not thrown away, and the run ends with an evaluation of its own step."""
    config = EvaluationConfig(every_steps=10, patience=1)
    behind = replace(evaluated([1, 2, 3], EvaluationConfig(every_steps=10, patience=5))[-1], step=33)
    assert not ended_early(behind, config, STEPS)
    assert ended_early(after_evaluation(replace(behind, step=40), 2.0, config), config, STEPS)


def test_what_an_older_release_evaluated_counts() -> None:
    config = EvaluationConfig(every_steps=10, patience=1)
    older = Progress(step=100, eval_loss=1.0, first_eval_loss=3.0, eval_step=100)
    (last,) = evaluated([1.6], config, older)
    assert (last.best_eval_loss, last.best_eval_step) == (1.0, 100) and ended_early(last, config, STEPS)


@pytest.mark.parametrize(
    ("progress", "missing"),
    [
        (Progress(), True),  # at the start
        (Progress(step=20), True),
        (Progress(step=20, eval_loss=1.0, eval_step=10), True),
        (Progress(step=20, eval_loss=1.0, eval_step=20), False),
        (Progress(step=25, eval_loss=1.0, eval_step=20), False),
        (Progress(step=55, eval_loss=1.0, eval_step=50), True),  # the last
        (Progress(step=62, eval_loss=1.0, eval_step=50), True),  # of a run that was to be longer
        (Progress(step=55, eval_loss=1.0), False),  # of a release that did not note the step
    ],
)
def test_an_evaluation_that_was_not_made_is_missing(progress: Progress, missing: bool) -> None:
    assert is_missing(progress, EvaluationConfig(every_steps=10, at_start=True), num_steps=55) == missing


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["evaluation={patience: 2}"], "patience=2 needs every_steps"),
        (["evaluation={patience: 2, every_steps: 5}", "data.validation=[]"], "patience=2 needs held-out records"),
        (["export.best=true"], "export.best=true needs checkpoint.keep_best=1"),
        (["export.best=true", "checkpoint.keep_best=1", "data.validation=[]"], "export.best=true needs .*held-out"),
    ],
)
def test_what_it_needs_is_named(tmp_path: Path, overrides: list[str], named: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    with pytest.raises(BadInput, match=named):
        load_config(str(path), overrides)


def test_the_best_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert checkpoint_to_export(config, run).step == 30 and not capsys.readouterr().out
    assert checkpoint_to_export(config, run, 20).step == 20, "what is asked for by its step"
    assert checkpoint_to_export(load_config(str(path)), run).step == 40
    commit(run, attempt, 50, best_eval_loss=0.25, best_eval_step=45)
    assert checkpoint_to_export(config, run).step == 30
    assert "0.2500, was that of step 45, of which there is no checkpoint; step 30" in capsys.readouterr().out
