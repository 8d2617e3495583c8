"""The GPU benchmark runs on a CPU by the same code, and its figures add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command import ROOT, environment

SCRIPT = str(ROOT / "benchmarks" / "gpu_step.py")
SMALL = ["--shape", "tiny", "--device", "cpu", "--seq-len", "64", "--grad-accum", "2", "--steps", "2", "--warm-up", "1"]


def test_the_same_script_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *SMALL, "--method", "full", "--json", str(tmp_path / "found.json")],
        env=environment(OMP_NUM_THREADS="1"),
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    layers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)  # q and o; k and v of half the heads; gate, up and down
    assert found["parameters"] == found["trained_parameters"] == layers + 2 * 512 * 64 + 5 * 64
    assert found["tokens_per_step"] == 128
    # Eight sequences of 16 tokens; the first token of each is predicted by nothing.
    expected = {"layers": 6 * layers * 128, "head": 6 * 512 * 64 * 120, "attention": 6 * 8 * 16**2 * 64 * 2}
    assert found["flops_per_step"] == expected
    seconds = sum(found["step_seconds"]) / 2  # the median of two
    assert found["tokens_per_second"] == pytest.approx(128 / seconds)
    assert found["achieved_flops"] == pytest.approx(sum(expected.values()) / seconds)
    assert all(5.5 < loss < 7 for loss in found["losses"]), "random weights know nothing: about ln 512 = 6.2"
    for word in ("tokens/s", "of a step", "TFLOP/s", "GiB resident", "planned"):
        assert word in done.stdout
