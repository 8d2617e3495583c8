"""Which row comes at which position of the run: a pure function, with O(1) random access and no state.

The only cursor is the number of rows consumed. Without weights, epoch ``e`` is a keyed permutation of all rows (or the
file's order), so each comes exactly once; position ``p`` of the concatenated epochs is row
``permutation(seed, p // num_rows)(p % num_rows)``. With weights, ``mixture.py`` says whose turn it is, and
every source has epochs of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from data_shards.order.mixture import Mixture, Repeats, SourceRows, has_weights
from data_shards.order.permutation import Order, permute, visited

__all__ = ["SAMPLER_VERSION", "Order", "Repeats", "Sampler", "SourceRows", "permute"]

SAMPLER_VERSION = 1
"""Part of the fingerprint: a change of the order must not slip into a resumed run. That of a mixture has its own,
``mixture.MIXTURE_VERSION``."""

_BLOCK = 2048
"""Positions worked out at once: one by one, or by the rows of a small step, they take twenty times as long."""


@lru_cache(maxsize=4)
def _rows_of_block(block: int, num_rows: int, seed: int, order: Order) -> np.ndarray:
    return visited(np.arange(block * _BLOCK, (block + 1) * _BLOCK, dtype=np.int64), num_rows, seed, order)


@dataclass(frozen=True)
class Sampler:
    """The order of a run over a dataset of ``num_rows`` packs.

    ``total_rows`` is where the run ends (positions, over all epochs); only the last step may be short. An epoch is as
    many positions as there are rows: without weights each row once; with weights each source's share of them, which may
    be more or fewer than its rows (``repeats`` counts).

    ``sources`` are the parts of the dataset, contiguous and in this order. They matter where they have weights; then
    all of them must.

    Raises DataError where the weights can't be honoured.
    """

    num_rows: int
    seed: int
    global_batch: int
    total_rows: int
    order: Order = Order.SHUFFLED
    sources: tuple[SourceRows, ...] = ()

    def __post_init__(self) -> None:
        if min(self.num_rows, self.global_batch, self.total_rows) < 1:
            raise ValueError(f"a sampler needs at least one row, batch and step: {self}")
        if self.sources and sum(source.rows for source in self.sources) != self.num_rows:
            raise ValueError(f"the sources' rows do not add up to the dataset's: {self}")
        _ = self.mixture  # raises here rather than at the first step

    @cached_property
    def mixture(self) -> Mixture | None:
        return Mixture(self.sources, self.seed, self.order) if has_weights(self.sources) else None

    @property
    def num_steps(self) -> int:
        return -(-self.total_rows // self.global_batch)

    def rows_at(self, start: int, stop: int) -> np.ndarray:
        """Row ids at positions ``[start, stop)`` of the concatenated epochs: int64 ``[stop - start]``."""
        if self.mixture:
            return self.mixture.rows_at(start, stop)
        stop = max(start, stop)
        blocks = range(start // _BLOCK, -(-stop // _BLOCK))
        rows = [_rows_of_block(block, self.num_rows, self.seed, self.order) for block in blocks]
        return np.concatenate([np.zeros(0, np.int64), *rows])[start - blocks.start * _BLOCK :][: stop - start]

    def rows_of_step(self, step: int) -> np.ndarray:
        """Row ids of the step after ``step`` completed ones: int64 ``[global_batch]``, the last may be shorter."""
        start = step * self.global_batch
        return self.rows_at(start, min(start + self.global_batch, self.total_rows))

    def repeats(self, source: str, positions: int) -> Repeats:
        """How often the run's first ``positions`` visit a source with a weight.

        Raises ValueError without weights: then ``positions // num_rows`` epochs are all there is to say.
        """
        if not self.mixture:
            raise ValueError("repeats are counted for sources with weights")
        return self.mixture.repeats(source, positions)
