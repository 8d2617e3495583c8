"""Chi-square tests on the shuffle, strong enough that fewer Feistel rounds or a linear congruence fail them.

Seeds are fixed, so a result is always the same; P is the share of truly random permutations that would look worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from data_shards.order import permutation
from data_shards.order.permutation import mix64, permute, uniform

Permutations = Callable[[np.ndarray, int, int, np.ndarray], np.ndarray]
"""(places ``[n]``, number of rows, seed, epochs ``[E]``) to rows ``[E, n]``"""

PLAUSIBLE = (1e-4, 1 - 1e-4)
IMPOSSIBLE = 1e-12
EPOCHS = np.arange(40)


def shuffle(places: np.ndarray, num_rows: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    flat = permute(np.tile(places, len(epochs)), num_rows, seed, np.repeat(epochs, len(places)))
    return flat.reshape(len(epochs), len(places))


def chi_square_p(statistic: float, freedom: int) -> float:
    """Upper tail of the chi-square distribution (Wilson and Hilferty, PNAS 17, 1931); good to a few per cent."""
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return math.erfc(z / math.sqrt(2)) / 2


def p_of_counts(counts: np.ndarray) -> float:
    """Are all cells alike? For independent draws."""
    expected = counts.sum() / counts.size
    return chi_square_p(float(((counts - expected) ** 2 / expected).sum()), counts.size - 1)


def some_seeds(count: int) -> list[int]:
    """Half of them follow each other, as a user's would, half are spread over 64 bits."""
    return [*range(count // 2), *map(int, mix64(np.arange(1, count - count // 2 + 1, dtype=np.uint64)))]


def p_of_places(shuffled: Permutations, num_rows: int, seeds: int) -> float:
    """Does each row come equally often at each place?"""
    counts = np.zeros((num_rows, num_rows))
    places = np.arange(num_rows)
    for seed in some_seeds(seeds):
        np.add.at(counts, (places, shuffled(places, num_rows, seed, EPOCHS)), 1)
    expected = seeds * len(EPOCHS) / num_rows
    # Rows and columns of counts have fixed sums, so the sum is n / (n - 1) of a chi-square of (n - 1)^2.
    statistic = ((counts - expected) ** 2 / expected).sum() * (num_rows - 1) / num_rows
    return chi_square_p(float(statistic), (num_rows - 1) ** 2)


def p_of_neighbours(shuffled: Permutations, num_rows: int, seeds: int) -> float:
    """Does each ordered pair of rows come equally often at neighbouring places? One pair of places a permutation."""
    counts = np.zeros((num_rows, num_rows))
    for number, seed in enumerate(some_seeds(seeds)):
        place = number % (num_rows - 1)
        pairs = shuffled(np.array([place, place + 1]), num_rows, seed, EPOCHS)
        np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    assert counts.trace() == 0
    return p_of_counts(counts[~np.eye(num_rows, dtype=bool)])


@pytest.mark.parametrize("num_rows", [3, 4, 5, 16, 17, 31, 100])
def test_every_row_comes_at_every_place_alike(num_rows: int) -> None:
    assert PLAUSIBLE[0] < p_of_places(shuffle, num_rows, seeds=100) < PLAUSIBLE[1]


@pytest.mark.parametrize("num_rows", [4, 5, 16, 17, 23])
def test_every_row_follows_every_other_alike(num_rows: int) -> None:
    assert PLAUSIBLE[0] < p_of_neighbours(shuffle, num_rows, seeds=200) < PLAUSIBLE[1]


def test_a_million_rows_are_spread_alike() -> None:
    """Where the rows of one window of places lie in the dataset, and how far apart those at neighbouring places are."""
    num_rows, cells = 10**6 + 3, 64
    window = np.arange(400_000, 440_000)
    for epoch in range(3):
        rows = permute(window, num_rows, 11, epoch)
        steps = np.diff(rows) % num_rows
        for values in (rows, steps):
            p = p_of_counts(np.bincount(values * cells // num_rows, minlength=cells))
            assert PLAUSIBLE[0] < p < PLAUSIBLE[1]


def linear_congruence(places: np.ndarray, num_rows: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """A cheap shuffle that is used in the wild: a random multiple of the place, and a random shift."""
    rng = np.random.default_rng(seed)
    factors = [factor for factor in range(1, num_rows) if math.gcd(factor, num_rows) == 1]
    factor, shift = rng.choice(factors, len(epochs)), rng.integers(num_rows, size=len(epochs))
    return (factor[:, None] * places + shift[:, None]) % num_rows


def test_a_linear_congruence_fails_where_the_shuffle_passes() -> None:
    # Any row comes anywhere, but all neighbours of a permutation are equally far apart.
    assert p_of_places(linear_congruence, 31, seeds=100) > PLAUSIBLE[0]
    assert p_of_neighbours(linear_congruence, 16, seeds=200) < IMPOSSIBLE


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_fewer_rounds_fail(rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "_ROUNDS", rounds)
    assert p_of_neighbours(shuffle, 16, seeds=200) < IMPOSSIBLE


def test_jitter_is_uniform_for_neighbouring_seeds_and_indices() -> None:
    drawn, following = uniform(5, np.arange(64_000)), uniform(6, np.arange(64_000))
    assert drawn.min() >= 0 and drawn.max() < 1
    for a, b in [(drawn[:-1:2], drawn[1::2]), (drawn, following), (drawn[1:], following[:-1])]:
        cells = (a * 16).astype(int) * 16 + (b * 16).astype(int)
        assert PLAUSIBLE[0] < p_of_counts(np.bincount(cells, minlength=256)) < PLAUSIBLE[1]
