"""Which row comes at which position of the run: a pure function, with O(1) random access and no state.

The only cursor is the number of rows consumed. Epoch ``e`` is a keyed permutation of all rows, so each comes exactly
once; position ``p`` of the concatenated epochs is row ``permutation(seed, p // num_rows)(p % num_rows)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SAMPLER_VERSION = 1
"""Part of the fingerprint: a change of the order must not slip into a resumed run."""

_ROUNDS = 6
_MASK64 = (1 << 64) - 1


def _mix64(value: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser, element-wise on uint64 (Steele et al., OOPSLA 2014)."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    base = (seed * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xD1B54A32D192ED03) & _MASK64
    with np.errstate(over="ignore"):
        steps = np.uint64(base) + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return _mix64(_mix64(steps))


def permute(index: np.ndarray, num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """Image of each ``index`` under the keyed permutation of ``range(num_rows)``.

    A Feistel network over the next even power of two, walked until it falls inside the range (cycle walking; Black and
    Rogaway, CT-RSA 2002). Fewer than four walks per element on average.

    Args:
        index: int64 ``[n]``, each in ``[0, num_rows)``.

    Returns:
        int64 ``[n]``.
    """
    half_bits = max(1, -(-int(num_rows - 1).bit_length() // 2))
    half_mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    keys = _round_keys(seed, epoch)
    out = np.asarray(index, dtype=np.uint64).copy()
    pending = np.arange(out.size)
    with np.errstate(over="ignore"):
        while pending.size:
            left, right = out[pending] >> shift, out[pending] & half_mask
            for key in keys:
                left, right = right, left ^ (_mix64(right + key) & half_mask)
            out[pending] = (left << shift) | right
            pending = pending[out[pending] >= num_rows]
    return out.astype(np.int64)


@dataclass(frozen=True)
class Sampler:
    """The order of a run over a dataset of ``num_rows`` packs.

    ``total_rows`` is where the run ends (positions, over all epochs); only the last step may be short.
    """

    num_rows: int
    seed: int
    global_batch: int
    total_rows: int

    def __post_init__(self) -> None:
        if min(self.num_rows, self.global_batch, self.total_rows) < 1:
            raise ValueError(f"a sampler needs at least one row, batch and step: {self}")

    @property
    def num_steps(self) -> int:
        return -(-self.total_rows // self.global_batch)

    def rows_at(self, start: int, stop: int) -> np.ndarray:
        """Row ids at positions ``[start, stop)`` of the concatenated epochs: int64 ``[stop - start]``."""
        position = np.arange(start, stop, dtype=np.int64)
        epoch, index = position // self.num_rows, position % self.num_rows
        rows = np.empty_like(position)
        for value in np.unique(epoch):
            chosen = epoch == value
            rows[chosen] = permute(index[chosen], self.num_rows, self.seed, int(value))
        return rows

    def rows_of_step(self, step: int) -> np.ndarray:
        """Row ids of the step after ``step`` completed ones: int64 ``[global_batch]``, the last may be shorter."""
        start = step * self.global_batch
        return self.rows_at(start, min(start + self.global_batch, self.total_rows))
