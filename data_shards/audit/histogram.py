"""A histogram of token counts of fixed size, whatever the corpus (pure)."""

from __future__ import annotations

import numpy as np

BINS_PER_OCTAVE = 8
_OCTAVES = 26

EDGES = np.unique(np.rint(2 ** (np.arange(BINS_PER_OCTAVE * _OCTAVES + 1) / BINS_PER_OCTAVE)).astype(np.int64))
"""int64 ``[E]``: bin ``i`` counts lengths in ``[EDGES[i], EDGES[i + 1])``, the last one all that are longer. Up to 11
tokens each length has its own bin, beyond that a bin spans 9%."""


def histogram(lengths: np.ndarray) -> np.ndarray:
    """``lengths`` int ``[n]`` to counts int64 ``[E]``. A length of 0 counts as 1."""
    bins = np.searchsorted(EDGES, np.maximum(lengths, 1), side="right") - 1
    return np.bincount(bins, minlength=len(EDGES)).astype(np.int64)


def quantile(counts: np.ndarray, share: float) -> int:
    """The largest length in the bin below which at least ``share`` of all lie; 0 where there are none."""
    total = int(counts.sum())
    if not total:
        return 0
    place = int(np.searchsorted(np.cumsum(counts), share * total, side="left"))
    return int(EDGES[place + 1] - 1) if place + 1 < len(EDGES) else int(EDGES[-1])
