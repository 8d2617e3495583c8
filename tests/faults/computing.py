"""Steps that compute nonsense, and memory that is not there."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch

import trainer.engine
import trainer.oom_kills
from launch.exit_codes import ExitCode
from tests.faults.bench import AT, EVERY, Bench, Install, Mark, Result, Trial, at_step, before_steps, rank
from tests.faults.processes import kill_me, survives


def nan_at_step(mark: Mark, *, on: Callable[[int], bool], always: bool) -> Install:
    """The loss of the step after ``AT`` is NaN on these ranks; ``always``: also when the step is done again."""

    def install() -> None:
        honest = trainer.engine.token_loss_sum

        def spoil(step: int) -> None:
            me = rank()
            spoiled = step == AT and me is not None and on(me) and (mark.fire(step) or always)
            trainer.engine.token_loss_sum = nan if spoiled else honest

        def nan(*arguments: Any) -> Any:
            return honest(*arguments) * math.nan

        before_steps(spoil)

    return install


def nan_on_one(bench: Bench) -> Result:
    """Once, as a machine does that computes wrongly."""
    trial = bench.trial("nan-one", training={"on_nonfinite": "rollback"})
    nan = nan_at_step(trial.mark(), on=lambda me: me == 1, always=False)
    result = survives(trial, nan, said="the loss is nan on rank 1 with rows")
    return Result(f"on_nonfinite=rollback: {result.outcome}", result.lost_steps, result.recovery_s)


def nan_on_all(bench: Bench) -> Result:
    """Again and again, as wrong data does."""
    trial = bench.trial("nan-all")
    nan = nan_at_step(trial.mark(), on=lambda me: True, always=True)
    reason = _stops(trial, nan)
    assert re.search(rf"NonFiniteStep: step {AT + 1}: the loss is nan on rank 0 with rows .*rank 1", reason), reason
    return _mended(trial, "“step 8: the loss is nan on rank 0 with rows …, rank 1 …”")


def _stops(trial: Trial, install: Install) -> str:
    """Why, in the first attempt."""
    assert trial.give(install) == ExitCode.FAILED, trial.log
    assert trial.mark().is_there and trial.files.result["attempts"] == 1
    assert trial.files.result["step"] == trial.newest.step == AT // EVERY * EVERY, "what was committed is intact"
    return str(trial.files.result["reason"])


def _mended(trial: Trial, said: str) -> Result:
    """The same command, once the cause is gone."""
    lost = trial.lost_steps
    assert trial.give() == ExitCode.DONE, trial.log
    trial.check_same_end()
    return Result(f"stops with exit code 1: {said}; mended and given again, the same end, bit for bit", lost)


def gpu_out_of_memory(bench: Bench) -> Result:
    trial = bench.trial("gpu-memory")

    def fail() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 79.1 GiB")

    reason = _stops(trial, at_step(trial.mark(), fail))
    assert re.search(
        r"OutOfMemory: rank 1 on \S+ ran out of .* in step 8.*The plan had said .*lower training\.", reason
    )
    return _mended(trial, "“rank 1 … ran out of … memory in step 8”, the figures, the plan, the knobs")


def host_out_of_memory(bench: Bench) -> Result:
    """The kernel's SIGKILL, and its count of such kills as it would be after it."""
    trial = bench.trial("host-memory")
    mark = trial.mark()

    def install() -> None:
        trainer.oom_kills.count = lambda *_: 3 + mark.is_there  # type: ignore[assignment]

    said = "the kernel killed 1 of the processes here for want of host memory"
    result = survives(trial, at_step(mark, kill_me), install, said=said)
    return Result(f"{result.outcome}; named: “{said}”", result.lost_steps, result.recovery_s)
