"""Fault 32: a worker that finds no memory ends the run at once, with the figures, the plan's, and the knobs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launch import finetune
from tests.integration.conftest import Workshop
from tests.support.command import RunFiles, run_here, write_config
from tests.support.worker_faults import Fault, install


def test_a_lack_of_memory_is_told_with_the_plan(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(monkeypatch, Fault.NO_MEMORY, tmp_path / "fired", rank=1, step=4)
    done = run_here(finetune.main, "--config", str(write_config(workshop.data, workshop.values, "no-memory")))
    assert (tmp_path / "fired").exists() and done.code == 1, done.output
    result = RunFiles(workshop.data / "runs" / "no-memory").result
    assert result["attempts"] == 1, "it would come again"
    assert re.search(
        r"OutOfMemory: rank 1 on \S+ ran out of host memory in step 5, "
        r"\w+, after 4 good steps: .* GiB by this "
        r"process, .* free of .* GiB\. The plan had said [1-9]\S* GiB for this worker, at its "
        r"worst in \w+\. If it comes again: lower training\.micro_batch "
        r"\(now 2; results stay the same\), or .*DefaultCPUAllocator",
        result["reason"],
    ), result["reason"]
