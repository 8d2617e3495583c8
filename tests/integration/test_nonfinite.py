"""Faults 35 and 36: a loss that is inf or NaN, on one rank or all, under each policy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.order.sampler import Sampler
from launch import finetune
from tests.integration.conftest import Workshop
from tests.support.command import RunFiles, run_here, write_config
from tests.support.distributed import run_workers
from tests.support.engines import ADAMW, full_weights, make_engine
from tests.support.tiny import ragged_packs, save_tiny_model
from tests.support.worker_faults import Fault, install
from trainer import engine as engine_module
from trainer.events import EventKind, read_events
from trainer.run_directory import RunDirectory
from trainer.step import StepResult, train_step

PACKS = ragged_packs(19, seed=3)
BAD_STEP, STEPS = 2, 5

Spoilt = dict[int | None, float]
"""what spoils the loss, by rank; None: on every rank"""


def train(base: str, spoilt: Spoilt | None) -> tuple[list[StepResult], dict[str, torch.Tensor], int]:
    """Five steps, with a spoilt one or without it; None: that step is not done at all."""
    engine = make_engine(base, ADAMW)
    sampler = Sampler(num_rows=19, seed=5, global_batch=6, total_rows=6 * STEPS)
    honest, results = engine_module.token_loss_sum, []
    for step in range(STEPS):
        if step == BAD_STEP and spoilt is None:
            continue
        more = (spoilt or {}).get(None, (spoilt or {}).get(engine.rank)) if step == BAD_STEP else None
        engine_module.token_loss_sum = honest if more is None else _spoilt(honest, more)
        rows = sampler.rows_of_step(step)
        results.append(train_step(engine, PACKS, rows, step=step, seed=5, micro_batch_size=2, learning_rate=ADAMW.lr))
    engine_module.token_loss_sum = honest
    return results, full_weights(engine), engine.optimizer_step()


def _spoilt(honest: Callable[..., torch.Tensor], more: float) -> Callable[..., torch.Tensor]:
    """Adding inf leaves gradients finite; a factor of NaN spoils them."""
    return lambda *arguments: honest(*arguments) + more if math.isinf(more) else honest(*arguments) * more


CASES: dict[str, Spoilt] = {
    "NaN on rank 1": {1: math.nan},
    "NaN on all": {None: math.nan},
    "inf on rank 0, all gradients finite": {0: math.inf},
}


def trained_with_each(base: str) -> list[Any]:
    return [train(base, spoilt) for spoilt in [None, *CASES.values()]]


def test_all_ranks_leave_the_same_update_out(tmp_path: Path) -> None:
    """Bit for bit as if the step had not been: the weights, and the updates that Adam counts."""
    by_rank = run_workers(trained_with_each, 2, str(save_tiny_model(tmp_path / "base")))
    for (_, wanted, wanted_updates), *cases in by_rank:
        for name, (results, weights, updates) in zip(CASES, cases, strict=True):
            assert [result.applied for result in results] == [step != BAD_STEP for step in range(STEPS)], name
            assert not math.isfinite(results[BAD_STEP].loss) and results[BAD_STEP].rows == 6
            assert updates == wanted_updates == STEPS - 1
            assert all(torch.equal(weights[key], value) for key, value in wanted.items()), name
    for results in zip(*([each[0] for each in rank[1:]] for rank in by_rank), strict=True):
        first, second = (result[BAD_STEP].nonfinite_rows for result in results)
        assert first == second and first
    named = [set(by_rank[0][1 + i][0][BAD_STEP].nonfinite_rows) for i in range(len(CASES))]
    assert named == [{1}, {0, 1}, {0}]


LENGTH, EVERY, AT = 9, 3, 4


@pytest.fixture(scope="module")
def values(workshop: Workshop) -> dict[str, Any]:
    return workshop.values | {
        "training": {"global_batch": 4, "micro_batch": 2, "steps": LENGTH},
        "checkpoint": {"every_steps": EVERY},
    }


@pytest.fixture(scope="module")
def undisturbed(workshop: Workshop, values: dict[str, Any]) -> RunFiles:
    return finished(workshop, values, "finite")


def finished(workshop: Workshop, values: dict[str, Any], name: str, *overrides: str) -> RunFiles:
    done = run_here(finetune.main, "--config", str(write_config(workshop.data, values, name)), *overrides)
    assert done.code == 0, done.output
    return RunFiles(workshop.data / "runs" / name)


def weights(files: RunFiles) -> dict[str, bytes]:
    (newest,) = [path for path in (files.path / "checkpoints").iterdir() if path.name.startswith(f"{LENGTH:08d}")]
    return {path.name: path.read_bytes() for path in newest.glob("rank-*.safetensors")}


def test_stop_names_rank_and_rows(
    workshop: Workshop, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, Fault.NAN, tmp_path / "fired", rank=1, step=AT, always=True)
    done = run_here(finetune.main, "--config", str(write_config(workshop.data, values, "nan-stop")))
    assert (tmp_path / "fired").exists() and done.code == 1, done.output
    files = RunFiles(workshop.data / "runs" / "nan-stop")
    assert files.result["attempts"] == 1 and files.result["step"] == EVERY, "what was committed is intact"
    reason = files.result["reason"]
    assert f"NonFiniteStep: step {AT + 1}: the loss is nan on rank 1 with rows" in reason
    assert "training.on_nonfinite=skip" in reason
    (attempt,) = files.path.glob("attempts/*")
    (event,) = [e for e in read_events(RunDirectory.at(str(files.path)), attempt.name) if e.kind == EventKind.NONFINITE]
    assert event.details["step"] == AT + 1 and list(event.details["rows"]) == ["1"]


def test_skip_counts_them_and_a_resumed_run_is_the_same(
    workshop: Workshop, values: dict[str, Any], undisturbed: RunFiles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    skip = values | {"training": values["training"] | {"on_nonfinite": "skip"}}
    install(monkeypatch, Fault.NAN, tmp_path / "fired", rank=None, step=AT, always=True)
    whole = finished(workshop, skip, "nan-skip")
    assert (tmp_path / "fired").exists()
    assert whole.result["attempts"] == 1 and whole.result["skipped_steps"] == 1 and whole.result["step"] == LENGTH
    steps = whole.steps()
    assert steps[AT + 1]["loss"] is None and set(steps[AT + 1]["nonfinite_rows"]) == {"0", "1"}
    assert steps[AT + 1]["applied"] is False and "applied" not in steps[AT]
    assert weights(whole) != weights(undisturbed)
    cut = finished(workshop, skip, "nan-skip-cut", f"training.steps={AT + 2}", "optimizer.schedule=constant")
    assert cut.result["skipped_steps"] == 1
    resumed = finished(workshop, skip, "nan-skip-cut", "optimizer.schedule=constant")
    left_alone = finished(workshop, skip, "nan-skip-constant", "optimizer.schedule=constant")
    assert resumed.result["attempts"] == 2 and resumed.result["skipped_steps"] == 1
    assert resumed.steps().keys() == left_alone.steps().keys() and weights(resumed) == weights(left_alone)


def test_skip_stops_when_too_many_come_in_a_row(
    workshop: Workshop, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = {"on_nonfinite": "skip", "max_skipped_in_a_row": 2}
    install(monkeypatch, Fault.NAN, tmp_path / "fired", rank=1, step=AT, always=True, until=LENGTH)
    config = write_config(workshop.data, values | {"training": values["training"] | few}, "nan-row")
    done = run_here(finetune.main, "--config", str(config))
    result = RunFiles(workshop.data / "runs" / "nan-row").result
    assert done.code == 1 and f"step {AT + 3}: " in result["reason"], done.output
    assert "and so were the 2 steps before it (training.max_skipped_in_a_row)" in result["reason"]


@pytest.mark.parametrize("always", [False, True])
def test_rollback_goes_back_once(
    workshop: Workshop,
    values: dict[str, Any],
    undisturbed: RunFiles,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    always: bool,
) -> None:
    """What a machine did wrong is done right the second time; what the data or the weights do comes again."""
    rollback = values | {"training": values["training"] | {"on_nonfinite": "rollback"}}
    install(monkeypatch, Fault.NAN, tmp_path / "fired", rank=1, step=AT, always=always)
    name = f"nan-rollback-{always}"
    done = run_here(finetune.main, "--config", str(write_config(workshop.data, rollback, name)))
    files = RunFiles(workshop.data / "runs" / name)
    assert (tmp_path / "fired").exists() and files.result["attempts"] == 2, done.output
    starts = {json.loads(path.read_text())["start_step"] for path in files.path.glob("attempts/*/start.json")}
    assert starts == {0, EVERY}
    if always:
        assert done.code == 1 and "a crash loop: step 5 failed in the same way" in files.result["reason"]
    else:
        assert done.code == 0, done.output
        assert files.trace() == undisturbed.trace() and weights(files) == weights(undisturbed)
