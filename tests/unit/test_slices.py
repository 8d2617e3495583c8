"""Interval arithmetic: every element exactly once, at any pair of world sizes."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.slices import overlaps, slice_bounds


@given(numel=st.integers(1, 5000), source=st.integers(1, 70), target=st.integers(1, 70))
@settings(deadline=None)
def test_resharding_moves_every_element_to_its_place(numel: int, source: int, target: int) -> None:
    whole = np.arange(numel)
    stored = [whole[slice(*slice_bounds(numel, rank, source))] for rank in range(source)]
    for rank in range(target):
        start, stop = slice_bounds(numel, rank, target)
        result = np.full(stop - start, -1)
        for piece in overlaps(numel, source, start, stop):
            values = stored[piece.source_rank][piece.start : piece.stop]
            result[piece.offset : piece.offset + len(values)] = values
        assert np.array_equal(result, whole[start:stop])
