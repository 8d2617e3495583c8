"""The order in which one set of rows is visited, epoch after epoch (pure, O(1) random access)."""

from __future__ import annotations

from enum import StrEnum

import numpy as np

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Order(StrEnum):
    SHUFFLED = "shuffled"
    """each epoch in another keyed order"""
    FILE = "file"
    """each epoch as the rows stand in the dataset"""


def mix64(value: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser, element-wise on uint64 (Steele et al., OOPSLA 2014)."""
    value = value ^ (value >> _SHIFTS[0])
    value *= _FACTORS[0]
    value ^= value >> _SHIFTS[1]
    value *= _FACTORS[1]
    value ^= value >> _SHIFTS[2]
    return value


def uniform(seed: int, index: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each ``index`` of any shape, float64: splitmix64 begun at a hash of ``seed``."""
    # Hashed, or the next seed's numbers would be these, one place further.
    key = mix64(np.array([~seed & _MASK64], np.uint64))
    drawn = mix64(mix64(key + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN)))
    return (drawn >> np.uint64(11)) * 2.0**-53


def _round_keys(seed: int, epoch: np.ndarray) -> np.ndarray:
    """uint64 ``[rounds, n]`` for epochs uint64 ``[n]``; sums and products wrap."""
    base = np.uint64(seed * _GOLDEN & _MASK64) + (epoch + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
    steps = np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return mix64(mix64(base + steps[:, None]))


def permute(index: np.ndarray, num_rows: int, seed: int, epoch: int | np.ndarray) -> np.ndarray:
    """Image of each ``index`` under the keyed permutation of ``range(num_rows)`` of its epoch.

    A Feistel network over the next even power of two, walked until it falls inside the range (cycle walking; Black and
    Rogaway, CT-RSA 2002). Fewer than four walks per element on average.

    Args:
        index: int64 ``[n]``, each in ``[0, num_rows)``.
        epoch: one for all, or int64 ``[n]``.

    Returns:
        int64 ``[n]``.
    """
    half_bits = max(1, -(-int(num_rows - 1).bit_length() // 2))
    half_mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    out = np.array(index, dtype=np.uint64)
    keys = _round_keys(seed, np.atleast_1d(np.asarray(epoch, dtype=np.uint64)))  # [rounds, 1 or n]
    pending, value = np.arange(out.size), out
    while pending.size:
        left, right = value >> shift, value & half_mask
        for key in keys:
            left, right = right, left ^ (mix64(right + key) & half_mask)
        value = (left << shift) | right
        out[pending] = value
        outside = value >= num_rows
        pending, value = pending[outside], value[outside]
        keys = keys if keys.shape[1] == 1 else keys[:, outside]
    return out.astype(np.int64)


def visited(visit: np.ndarray, num_rows: int, seed: int, order: Order) -> np.ndarray:
    """The row of each visit, int64 ``[n]``, counted from 0 over all epochs: every ``num_rows`` visits see each once."""
    epoch, index = np.divmod(visit, num_rows)
    if order == Order.FILE:
        return index
    one_epoch = epoch.size > 0 and epoch[0] == epoch[-1] and epoch.min() == epoch.max()
    return permute(index, num_rows, seed, int(epoch[0]) if one_epoch else epoch)
