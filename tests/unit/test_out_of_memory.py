"""A lack of memory is told with figures, the plan and the knobs; and whether the kernel killed anybody for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.failures import Action, AttemptEnd, EndKind, decide
from trainer import oom_kills
from trainer.activation_memory import Device
from trainer.config import TrainerConfig
from trainer.memory_plan import GIB
from trainer.out_of_memory import (
    MANY_STEPS,
    MemoryFigures,
    OutOfMemory,
    OutOfMemoryLate,
    is_out_of_memory,
    memory_figures,
    message,
)
from trainer.pulse import Phase
from trainer.run_directory import WorkerError

CONFIG = TrainerConfig.model_validate({"model": {"base": "b"}, "training": {"steps": 1, "micro_batch": 4}})
FIGURES = MemoryFigures(Device.GPU, 70 * GIB, 78 * GIB, GIB // 4, 80 * GIB)


def told(good_steps: int, phase: Phase = Phase.FORWARD_BACKWARD, config: TrainerConfig = CONFIG) -> str:
    return message(
        FIGURES, None, config, where="rank 3 on gpu-7", step=9, phase=phase, good_steps=good_steps, said="tried 2 GiB"
    )


def test_message_has_place_figures_and_knobs() -> None:
    text = told(0)
    for part in ("rank 3 on gpu-7", "step 9", "70.00 GiB", "78.00 GiB reserved", "0.25 GiB free of 80.00 GiB"):
        assert part in text
    for knob in ("training.micro_batch (now 4", "model.activation_checkpointing=true", "data.seq_len", "tried 2 GiB"):
        assert knob in text
    assert "evaluation.micro_batch" not in text and "fragmented" not in text
    assert "evaluation.micro_batch (now 4" in told(0, Phase.EVALUATION)
    assert "expandable_segments" in told(MANY_STEPS)
    bare = CONFIG.model_copy(
        update={
            "training": CONFIG.training.model_copy(update={"micro_batch": 1}),
            "model": CONFIG.model.model_copy(update={"activation_checkpointing": True}),
        }
    )
    assert "micro_batch" not in told(0, config=bare) and "activation_checkpointing" not in told(0, config=bare)


def test_it_is_known_whoever_says_it() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(real.value), real.value
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")) and is_out_of_memory(
        MemoryError()
    )
    assert not is_out_of_memory(RuntimeError("connection closed")) and not is_out_of_memory(OSError("out of memory"))
    figures = memory_figures(Device.CPU)
    assert 0 < figures.allocated < figures.total and 0 < figures.free <= figures.total


def test_at_first_it_is_fatal_and_late_it_is_tried_once_more() -> None:
    def end(error: OutOfMemory) -> AttemptEnd:
        return AttemptEnd(EndKind.FAILED, 0, 8, WorkerError.of(3, error, step=9))

    assert decide([end(OutOfMemory("x"))], 3, stop_wanted=False).action == Action.FAIL
    assert decide([end(OutOfMemoryLate("x"))], 3, stop_wanted=False).action == Action.RETRY
    assert decide([end(OutOfMemoryLate("x"))] * 2, 3, stop_wanted=False).action == Action.FAIL


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/pod/a\n", "pod/a/memory.events"),
        ("0::/pod/a\n", "memory.events"),
        ("5:cpu:/\n4:memory:/pod/a\n0::/\n", "memory/pod/a/memory.oom_control"),
        ("4:memory,hugetlb:/pod/a\n", "memory/memory.oom_control"),
    ],
)
def test_kills_are_counted_by_either_version_of_cgroups(tmp_path: Path, membership: str, file: str) -> None:
    assert oom_kills.count(membership, tmp_path) is None
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("low 0\noom 7\noom_kill 3\noom_group_kill 9\n")
    assert oom_kills.count(membership, tmp_path) == 3


def test_kills_are_told_where_there_were_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oom_kills, "count", lambda: 5)
    assert "killed 2 of the processes" in oom_kills.told(3)
    assert oom_kills.told(5) == oom_kills.told(None) == ""
