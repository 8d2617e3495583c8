"""Bit-equal runs: what ``training.deterministic`` switches on, before the first GPU kernel runs."""

from __future__ import annotations

import os

import torch


def make_deterministic() -> None:
    """The same bits from the same input on the same device, slower; an operation that can't raises RuntimeError.

    Source: docs.pytorch.org/docs/stable/notes/randomness.html. The workspace setting keeps cuBLAS from choosing another
    summation order when streams compete (docs.nvidia.com/cuda/cublas, "Results reproducibility"); the FlashAttention
    setting, read by transformers, makes the flash-attn package's backward add up in a fixed order.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    torch.use_deterministic_algorithms(True)
    # Else every torch.empty is filled with NaN first, also DeepSpeed's big buffers; nothing here reads them unwritten.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
