"""Best fit: every sequence once, no pack over its capacity, little room left."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_shards.packing import best_fit


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    capacity = draw(st.integers(1, 300))
    # Mostly short ones, so that packs hold several, and some of exactly the capacity.
    length = st.one_of(st.integers(1, max(1, capacity // 8)), st.integers(1, capacity), st.just(capacity))
    return np.array(draw(st.lists(length, max_size=80)), np.int64), capacity


def _loads(packs: list[list[int]], lengths: np.ndarray) -> np.ndarray:
    return np.array([lengths[pack].sum() for pack in packs], np.int64)


@given(case=lengths_and_capacity())
@example(case=(np.zeros(0, np.int64), 8))
@settings(deadline=None)
def test_every_index_once_and_no_pack_too_full(case: tuple[np.ndarray, int]) -> None:
    lengths, capacity = case
    packs = best_fit(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(packs), "a pack is empty"
    assert (_loads(packs, lengths) <= capacity).all()


@given(case=lengths_and_capacity())
@settings(deadline=None)
def test_at_most_one_pack_is_less_than_half_full(case: tuple[np.ndarray, int]) -> None:
    lengths, capacity = case
    loads = _loads(best_fit(lengths, capacity), lengths)
    assert (2 * loads <= capacity).sum() <= 1
    # More strongly: no two packs would fit into one.
    smallest = np.sort(loads)[:2]
    assert len(smallest) < 2 or smallest.sum() > capacity


@given(case=lengths_and_capacity())
@settings(deadline=None)
def test_result_is_that_of_the_definition(case: tuple[np.ndarray, int]) -> None:
    """Each sequence, longest first, goes where the least room is left; the number of packs follows."""
    lengths, capacity = case
    rooms: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    found = capacity - _loads(best_fit(lengths, capacity), lengths)
    assert sorted(found.tolist()) == sorted(rooms)


@given(case=lengths_and_capacity(), kind=st.sampled_from([np.int32, np.int64, list]))
@settings(deadline=None)
def test_result_depends_on_the_lengths_alone(case: tuple[np.ndarray, int], kind: type) -> None:
    lengths, capacity = case
    same = lengths.tolist() if kind is list else lengths.astype(kind)
    assert best_fit(same, capacity) == best_fit(lengths, capacity)


def test_ties_go_by_index() -> None:
    assert best_fit(np.array([5, 5, 5, 3, 3, 3]), 8) == [[0, 5], [1, 4], [2, 3]]
    assert best_fit(np.array([2, 8, 6]), 8) == [[1], [2, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_long_tailed_lengths_leave_under_three_percent_empty(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(mean=5.3, sigma=0.9, size=4000), 8, 2048).astype(np.int64)
    # The tail is there: the longest are full packs, the median is a tenth of one.
    assert (lengths == 2048).any() and np.median(lengths) < 250
    packs = best_fit(lengths, 2048)
    assert lengths.sum() / (len(packs) * 2048) >= 0.97


@pytest.mark.parametrize(("lengths", "capacity"), [([9], 8), ([3, 0], 8), ([-1], 8)])
def test_length_that_no_pack_can_hold_is_refused(lengths: list[int], capacity: int) -> None:
    with pytest.raises(ValueError, match=f"a pack holds {capacity}"):
        best_fit(np.array(lengths), capacity)
