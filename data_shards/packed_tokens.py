"""Packs with their tokens: what is written as the rows of shards."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_shards.packing import Packs


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
        until = np.cumsum(self.trained, dtype=np.int64)  # [T] trained tokens up to and including each
        begin = self.first_token[self.packs.index]
        return self._by_row(until[begin + self.packs.stop - 1] - until[begin + self.packs.start])

    def _by_row(self, values: np.ndarray) -> np.ndarray:
        """Sums over the pieces of each row. No row is empty."""
        return np.add.reduceat(values, self.packs.bounds[:-1]) if len(self) else np.zeros(0, np.int64)

    def rows(self, first: int, last: int) -> Rows:
        """The rows ``[first, last)``, at least one."""
        bounds = self.packs.bounds[first : last + 1]
        pieces = slice(bounds[0], bounds[-1])
        lengths = self.packs.stop[pieces] - self.packs.start[pieces]
        ends = np.cumsum(lengths)
        begins = self.first_token[self.packs.index[pieces]] + self.packs.start[pieces]
        tokens = np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1])
        offsets = np.concatenate([np.zeros(1, np.int64), ends])[bounds - bounds[0]]
        return Rows(offsets, self.input_ids[tokens], self.trained[tokens], bounds - bounds[0], lengths)
