"""Where the tests of ``tests/gpu`` run: on the GPU, on a CPU if asked to, else nowhere."""

from __future__ import annotations

import os

import pytest
import torch

ON_CPU = "BATON_GPU_TESTS_ON_CPU"


def _device() -> torch.device | None:
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    return torch.device("cpu") if os.environ.get(ON_CPU) else None


DEVICE = _device()

needs_device = pytest.mark.skipif(
    DEVICE is None,
    reason=f"no GPU here (torch.cuda.is_available() is false); {ON_CPU}=1 runs it on a CPU (docs/gpu.md)",
)
needs_gpu = pytest.mark.skipif(
    DEVICE is None or DEVICE.type != "cuda", reason="no GPU here (torch.cuda.is_available() is false)"
)
