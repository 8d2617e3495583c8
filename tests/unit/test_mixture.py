"""Weights between sources: exact in every block, close in every window, each row once before any comes twice."""

from __future__ import annotations

import pickle
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.errors import DataError
from data_shards.order.mixture import MIXTURE_VERSION, Mixture, block_length, largest_remainder, shares_of
from data_shards.order.sampler import Order, Repeats, Sampler, SourceRows

WEIGHTS = st.one_of(
    st.integers(1, 20).map(float),
    st.floats(0.05, 10).map(lambda weight: round(weight, 2)),
    st.sampled_from([1 / 3, 0.618034, 2**0.5]),
)
SOURCES = st.lists(st.tuples(st.integers(1, 40), WEIGHTS), min_size=1, max_size=5).map(
    lambda pairs: tuple(SourceRows(f"s{index}", *pair) for index, pair in enumerate(pairs))
)


def _source_of(rows: np.ndarray, sources: tuple[SourceRows, ...]) -> np.ndarray:
    return np.searchsorted(np.cumsum([source.rows for source in sources]), rows, side="right")


def _sampler(sources: tuple[SourceRows, ...], seed: int, total: int, order: Order = Order.SHUFFLED) -> Sampler:
    return Sampler(sum(source.rows for source in sources), seed, 8, total, order, sources)


@given(sources=SOURCES, seed=st.integers(0, 2**40), block=st.integers(0, 10**9), num_blocks=st.integers(1, 5))
@settings(deadline=None, max_examples=300)
def test_every_aligned_block_has_exactly_its_quotas(
    sources: tuple[SourceRows, ...], seed: int, block: int, num_blocks: int
) -> None:
    mixture = Mixture(sources, seed, Order.SHUFFLED)
    start = block * mixture.block
    rows = mixture.rows_at(start, start + num_blocks * mixture.block)
    for part in np.split(_source_of(rows, sources), num_blocks):
        assert np.array_equal(np.bincount(part, minlength=len(sources)), mixture.quotas)
    for share, quota in zip(shares_of(sources), mixture.quotas.tolist(), strict=True):
        assert abs(quota - share * mixture.block) < 1
        assert abs(Fraction(quota, mixture.block) - share) <= share / 100


@given(sources=SOURCES, seed=st.integers(0, 2**40), start=st.integers(0, 10**12), size=st.integers(1, 3000))
@settings(deadline=None, max_examples=300)
def test_weights_hold_in_every_window(sources: tuple[SourceRows, ...], seed: int, start: int, size: int) -> None:
    mixture = Mixture(sources, seed, Order.SHUFFLED)
    counts = np.bincount(_source_of(mixture.rows_at(start, start + size), sources), minlength=len(sources))
    shares = mixture.quotas / mixture.block
    assert (np.abs(counts - shares * size) < 2 * (1 + shares * len(sources))).all()


@given(sources=SOURCES, seed=st.integers(0, 2**40), order=st.sampled_from(Order), total=st.integers(1, 1500))
@settings(deadline=None, max_examples=300)
def test_every_row_of_a_source_comes_once_before_any_comes_twice(
    sources: tuple[SourceRows, ...], seed: int, order: Order, total: int
) -> None:
    sampler = _sampler(sources, seed, total, order)
    rows = sampler.rows_at(0, total)
    source_of = _source_of(rows, sources)
    first = 0
    for index, source in enumerate(sources):
        mine = rows[source_of == index] - first
        epochs, rest = divmod(len(mine), source.rows)
        assert sampler.repeats(source.name, total) == Repeats(epochs, rest)
        for epoch in range(epochs):
            once = mine[epoch * source.rows : (epoch + 1) * source.rows]
            assert np.array_equal(once if order == Order.FILE else np.sort(once), np.arange(source.rows))
        assert len(set(mine[epochs * source.rows :].tolist())) == rest
        first += source.rows


@given(sources=SOURCES, seed=st.integers(0, 2**40), start=st.integers(0, 10**12), cuts=st.lists(st.integers(0, 300)))
@settings(deadline=None)
def test_any_cut_of_the_run_gives_the_same_rows(
    sources: tuple[SourceRows, ...], seed: int, start: int, cuts: list[int]
) -> None:
    sampler = _sampler(sources, seed, 10**13)
    bounds = [start, *sorted(start + cut for cut in cuts), start + 300]
    parts = [sampler.rows_at(a, b) for a, b in pairwise(bounds)]
    assert np.array_equal(np.concatenate(parts), sampler.rows_at(start, start + 300))


def test_order_of_version_1_never_changes() -> None:
    assert MIXTURE_VERSION == 1
    sources = (SourceRows("chat", 6, 0.7), SourceRows("code", 3, 0.3))
    assert _sampler(sources, 5, 100).rows_at(0, 30).tolist() == PINNED
    by_file = _sampler(sources, 5, 100, Order.FILE).rows_at(0, 20).tolist()
    assert [row for row in by_file if row < 6] == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0, 1]
    assert [row for row in by_file if row >= 6] == [6, 7, 8, 6, 7, 8]


PINNED = [8, 3, 2, 0, 1, 7, 5, 4, 6, 1, 7, 4, 3, 2, 5, 6, 0, 4, 5, 8, 1, 3, 7, 0, 2, 6, 5, 8, 4, 3]


def test_a_share_of_a_thousandth_is_honoured() -> None:
    sources = (SourceRows("rare", 50, 0.1), SourceRows("usual", 10**9, 99.9))
    sampler = _sampler(sources, 1, 10**10)
    assert sampler.mixture is not None and sampler.mixture.block == 1000
    for start in (0, 123_000, 9 * 10**9):
        assert (sampler.rows_at(start, start + 1000) < 50).sum() == 1
    # 10^10 positions: ten million draws of fifty rows.
    assert sampler.repeats("rare", 10**10) == Repeats(200_000, 0)
    assert sampler.repeats("usual", 10**10) == Repeats(9, 990_000_000)
    assert sampler.mixture.shares() == {"rare": 0.001, "usual": 0.999}


def test_every_block_is_arranged_anew_and_so_for_every_seed() -> None:
    sources = (SourceRows("a", 10**6, 1.0), SourceRows("b", 10**6, 1.0), SourceRows("c", 10**6, 2.0))
    blocks = [
        tuple(_source_of(_sampler(sources, seed, 10**9).rows_at(4 * block, 4 * block + 4), sources).tolist())
        for seed in range(20)
        for block in range(20)
    ]
    # a, b, c, c: c comes once in each half of the block, a and b anywhere.
    assert len(set(blocks)) >= 8
    sources_of = np.array(blocks)
    assert all(abs((sources_of[:, place] == 0).mean() - 0.25) < 0.1 for place in range(4))


@pytest.mark.parametrize(
    ("weights", "length"),
    [
        ([1.0], 1),
        ([1.0, 1.0], 2),
        ([0.7, 0.3], 10),
        ([0.1, 0.2, 0.3], 6),
        ([1.0, 999.0], 1000),
        ([0.0001, 0.9999], 10_000),
        ([1 / 3, 2 / 3], 3),
        ([0.618034, 0.381966], 262),
        ([2**0.5, 999 * 2**0.5 + 1e-6], 100_000),
    ],
)
def test_length_of_a_block(weights: list[float], length: int) -> None:
    shares = shares_of([SourceRows(str(weight), 1, weight) for weight in weights])
    assert block_length(shares) == length
    quotas = largest_remainder(shares, length)
    assert sum(quotas) == length and min(quotas) >= 1


def test_largest_remainders_by_example() -> None:
    # 47.0, 16.0, 15.8, 12.0, 6.1, 3.1 of 10 seats: the standard example of Hamilton's method.
    shares = [Fraction(part, 1000) for part in (470, 160, 158, 120, 61, 31)]
    assert largest_remainder(shares, 10) == [5, 2, 1, 1, 1, 0]
    assert largest_remainder([Fraction(1, 3)] * 3, 4) == [2, 1, 1]


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((SourceRows("a", 5, 1.0), SourceRows("b", 5, None)), "sources b have no weight"),
        ((SourceRows("a", 5, 0.0), SourceRows("b", 5, 1.0)), "source a: a weight must be"),
        ((SourceRows("a", 5, -1.0), SourceRows("b", 5, 1.0)), "source a: a weight must be"),
        ((SourceRows("a", 5, float("nan")), SourceRows("b", 5, 1.0)), "source a: a weight must be"),
        ((SourceRows("a", 5, float("inf")), SourceRows("b", 5, 1.0)), "source a: a weight must be"),
        ((SourceRows("a", 0, 1.0), SourceRows("b", 5, 1.0)), "no rows to train on"),
        ((SourceRows("a", 5, 1e-5), SourceRows("b", 5, 1.0)), "shares under 0.01% can't be honoured"),
    ],
)
def test_weights_that_cannot_be_honoured_are_refused(sources: tuple[SourceRows, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        _sampler(sources, 0, 10)


def test_a_sampler_of_a_mixture_travels() -> None:
    sampler = _sampler((SourceRows("a", 9, 1.0), SourceRows("b", 4, 3.0)), 2, 50)
    same = pickle.loads(pickle.dumps(sampler))
    assert same == sampler and np.array_equal(same.rows_of_step(3), sampler.rows_of_step(3))
    assert sampler.num_steps == 7 and len(sampler.rows_of_step(6)) == 2
