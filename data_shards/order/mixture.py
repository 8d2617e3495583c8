"""Sources with weights: whose row comes at which position (pure, O(1) in rows and positions).

Positions are divided into blocks of a fixed length L. In every block source s has exactly its quota q_s, and the quotas
add up to L. The j-th draw of s in a block comes at the time ``(j + u) / q_s`` of it, u in [0, 1) from a hash of (seed,
block, s, j); the block's order is that of the times. So a source's draws are spread over the block, in their order, at
random places.

Weights therefore hold in any window, aligned with the blocks or not: of w positions, a source with share p of S sources
gets ``p * w`` give or take less than ``2 * (1 + p * S)``. (By time t of a block each source has had ``q_s * t`` draws
give or take less than one, so the position is ``L * t`` give or take less than S.)

The k-th draw of a source is the k-th visit of its rows, so that each comes once before any comes twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data_shards.errors import DataError
from data_shards.order.permutation import Order, uniform, visited

MIXTURE_VERSION = 1
"""Part of a weighted run's identity, as the weights are: a change of the order must not slip into a resumed run."""

SMALLEST_SHARE = Fraction(1, 10_000)
_LONGEST_EXACT_BLOCK = 10_000
_LONGEST_BLOCK = 100_000
_DRAWS_OF_SMALLEST = 100


class SourceRows(NamedTuple):
    """One source's part of a dataset."""

    name: str
    rows: int
    """packs"""
    weight: float | None
    """its share of the positions is its weight over the sum of all"""


class Repeats(NamedTuple):
    """Visits of a source: so many times all of its rows, and ``rest`` rows once more."""

    epochs: int
    rest: int


def has_weights(sources: Sequence[SourceRows]) -> bool:
    """Whether these are a mixture. Raises DataError where they can't be one."""
    without = [source.name for source in sources if source.weight is None]
    if len(without) == len(sources):
        return False
    if without:
        raise DataError(
            f"the sources {', '.join(without)} have no weight and others have one; give every source a weight, or none"
        )
    return True


def shares_of(sources: Sequence[SourceRows]) -> list[Fraction]:
    """Shares of the weights, exact as written in decimals. Raises DataError for those that can't be honoured."""
    for source in sources:
        if not (math.isfinite(source.weight or 0) and (source.weight or 0) > 0):
            raise DataError(
                f"source {source.name}: a weight must be a number greater than 0, not {source.weight}; to leave a "
                "source out, remove it"
            )
        if source.rows < 1:
            raise DataError(
                f"source {source.name} has weight {source.weight} but no rows to train on: all of its records were "
                "dropped or went to other splits; remove it, or look at why"
            )
    weights = [Fraction(str(float(source.weight or 0))) for source in sources]
    shares = [weight / sum(weights) for weight in weights]
    for source, share in zip(sources, shares, strict=True):
        if share < SMALLEST_SHARE:
            raise DataError(
                f"source {source.name}: weight {source.weight} is {float(share):.4%} of all weights together; shares "
                f"under {float(SMALLEST_SHARE):.2%} can't be honoured. Raise it, or join the source to another"
            )
    return shares


def block_length(shares: Sequence[Fraction]) -> int:
    """L: the shortest block in which every share is a whole number of draws, where that is at most 10,000.

    Elsewhere so long that the smallest share has 100 draws, which leaves each share's error under 1% of itself; at most
    100,000, so that a share between 0.01% and 0.1% may be off by up to 10% of itself.
    """
    exact = math.lcm(*(share.denominator for share in shares))
    if exact <= _LONGEST_EXACT_BLOCK:
        return exact
    return min(math.ceil(_DRAWS_OF_SMALLEST / min(shares)), _LONGEST_BLOCK)


def largest_remainder(shares: Sequence[Fraction], total: int) -> list[int]:
    """Whole numbers that add up to ``total``, each less than one from ``share * total`` (Hamilton); ties by index."""
    quotas = [math.floor(share * total) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: quotas[index] - shares[index] * total)
    for index in by_remainder[: total - sum(quotas)]:
        quotas[index] += 1
    return quotas


@dataclass(frozen=True)
class Mixture:
    """The order of rows of several sources, contiguous in the dataset, by their weights."""

    sources: tuple[SourceRows, ...]
    seed: int
    order: Order

    def __post_init__(self) -> None:
        _ = self.quotas

    @cached_property
    def quotas(self) -> np.ndarray:
        """Draws of each source in a block: int64 ``[sources]``."""
        shares = shares_of(self.sources)
        return np.array(largest_remainder(shares, block_length(shares)), np.int64)

    @property
    def block(self) -> int:
        """L, positions."""
        return int(self.quotas.sum())

    @cached_property
    def _owner(self) -> np.ndarray:
        """The source of each draw of a block: int64 ``[L]``."""
        return np.repeat(np.arange(len(self.quotas)), self.quotas)

    @cached_property
    def _number(self) -> np.ndarray:
        """Which of its source's draws in the block it is, from 0: int64 ``[L]``."""
        return np.arange(self.block) - np.repeat(np.cumsum(self.quotas) - self.quotas, self.quotas)

    def draws_at(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Of positions ``[start, stop)``: the source, and which of its draws it is. int64 ``[stop - start]`` each."""
        first, behind = start // self.block, -(-stop // self.block)
        blocks = np.arange(first, behind, dtype=np.int64)
        jitter = uniform(self.seed, blocks[:, None] * self.block + np.arange(self.block))  # [blocks, L]
        times = (self._number + jitter) / self.quotas[self._owner]
        # Times of one source never go down with its draws' numbers, and a stable sort leaves equal ones in their order.
        arranged = np.argsort(times, axis=1, kind="stable").reshape(-1)
        chosen = arranged[start - first * self.block : stop - first * self.block]
        block_of = np.arange(start, stop, dtype=np.int64) // self.block
        source = self._owner[chosen]
        return source, block_of * self.quotas[source] + self._number[chosen]

    def rows_at(self, start: int, stop: int) -> np.ndarray:
        """Row ids at positions ``[start, stop)``: int64 ``[stop - start]``."""
        source, draw = self.draws_at(start, stop)
        rows = np.empty_like(draw)
        first_row = 0
        for index, entry in enumerate(self.sources):
            mine = source == index
            rows[mine] = first_row + visited(draw[mine], entry.rows, _seed_of(self.seed, index), self.order)
            first_row += entry.rows
        return rows

    def repeats(self, source: str, positions: int) -> Repeats:
        """Visits of the source by this name in the run's first ``positions``."""
        index = [entry.name for entry in self.sources].index(source)
        whole, rest = divmod(positions, self.block)
        begun = self.draws_at(positions - rest, positions)[0]
        visits = whole * int(self.quotas[index]) + int((begun == index).sum())
        return Repeats(*divmod(visits, self.sources[index].rows))

    def shares(self) -> dict[str, float]:
        """What each source really gets of the positions, by name."""
        return {entry.name: int(quota) / self.block for entry, quota in zip(self.sources, self.quotas, strict=True)}


def _seed_of(seed: int, index: int) -> int:
    """Sources of one size must not go in step."""
    return seed + (index + 1) * 0xA0761D6478BD642F
