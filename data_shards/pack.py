"""The sampler's unit: one row of the dataset."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Sequence(NamedTuple):
    """One tokenised record. ``input_ids`` int32 ``[T]``; ``trained`` bool ``[T]``: is this token to be learnt."""

    input_ids: np.ndarray
    trained: np.ndarray

    @property
    def num_targets(self) -> int:
        """Trained tokens that something comes before; a sequence's first token is never predicted."""
        return int(self.trained[1:].sum())


class Pack(NamedTuple):
    """Packed sequences, without padding.

    ``input_ids`` int32 ``[T]``, ``trained`` bool ``[T]``, ``sequence_lengths`` int32 ``[S]`` summing to T.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    sequence_lengths: np.ndarray
