"""Packs with their tokens: what is written as the rows of shards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_shards.writing.packing import Packs

_ROWS_AT_ONCE = 256


class Rows(NamedTuple):
    """R packs of S sequences and T tokens, copied into their order."""

    offsets: np.ndarray
    """int64 [R + 1]: row r holds tokens [offsets[r], offsets[r + 1])"""
    input_ids: np.ndarray
    """int32 [T]"""
    trained: np.ndarray
    """bool [T]"""
    sequence_offsets: np.ndarray
    """int64 [R + 1]"""
    sequence_lengths: np.ndarray
    """int64 [S]"""


@dataclass(frozen=True)
class PackedTokens:
    """Sequences end to end, T tokens, and which pieces of them make up R packs.

    A million small arrays would take longer to join than all of their tokens to write, so there are none.
    """

    input_ids: np.ndarray
    """int32 [T]"""
    trained: np.ndarray
    """bool [T]"""
    first_token: np.ndarray
    """int64 [n]: where each sequence begins"""
    packs: Packs

    def __len__(self) -> int:
        return len(self.packs)

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """Of each row: int64 ``[R]``."""
        return self._by_row(self.packs.stop - self.packs.start)

    @cached_property
    def num_targets(self) -> np.ndarray:
        """Of each row, trained tokens that something comes before; the first of a piece is never predicted: int64
        ``[R]``."""
        # Block by block: sums up to each token of a whole window would take more memory than its tokens.
        blocks = range(0, len(self), _ROWS_AT_ONCE)
        counts = [self._num_targets(first, min(first + _ROWS_AT_ONCE, len(self))) for first in blocks]
        return np.concatenate([np.zeros(0, np.int64), *counts])

    def _num_targets(self, first: int, last: int) -> np.ndarray:
        tokens, ends, bounds = self._places(first, last)
        trained = self.trained[tokens]
        trained[0] = False
        trained[ends[:-1]] = False
        until = np.append(np.zeros(1, np.int64), np.cumsum(trained, dtype=np.int64))
        return np.diff(until[np.append(np.zeros(1, np.int64), ends)[bounds]])

    def _by_row(self, values: np.ndarray) -> np.ndarray:
        """Sums over the pieces of each row. No row is empty."""
        return np.add.reduceat(values, self.packs.bounds[:-1]) if len(self) else np.zeros(0, np.int64)

    def rows(self, first: int, last: int) -> Rows:
        """The rows ``[first, last)``, at least one."""
        tokens, ends, bounds = self._places(first, last)
        until = np.append(np.zeros(1, np.int64), ends)
        return Rows(until[bounds], self.input_ids[tokens], self.trained[tokens], bounds, np.diff(until))

    def _places(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the rows ``[first, last)``, at least one: where their T tokens lie, int64 ``[T]``; where each of their S
        pieces ends among them, int64 ``[S]``; and which pieces are each row's, as ``Packs.bounds``."""
        bounds = self.packs.bounds[first : last + 1]
        pieces = slice(bounds[0], bounds[-1])
        lengths = self.packs.stop[pieces] - self.packs.start[pieces]
        ends = np.cumsum(lengths)
        begins = self.first_token[self.packs.index[pieces]] + self.packs.start[pieces]
        return np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1]), ends, bounds - bounds[0]
