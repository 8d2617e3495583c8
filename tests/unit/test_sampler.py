"""Promise 1: which rows a step gets depends on nothing but seed, batch and step."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.sampler import Sampler, permute
from trainer.batch_geometry import rank_micro_batches


@given(num_rows=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 50))
@settings(deadline=None)
def test_each_epoch_visits_every_row_once(num_rows: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(num_rows), num_rows, seed, epoch)
    assert np.array_equal(np.sort(image), np.arange(num_rows))


def test_epochs_and_seeds_differ_and_spread() -> None:
    first, second = permute(np.arange(1000), 1000, 1, 0), permute(np.arange(1000), 1000, 1, 1)
    assert (first == second).mean() < 0.02
    assert (permute(np.arange(1000), 1000, 2, 0) == first).mean() < 0.02
    assert abs(np.corrcoef(np.arange(1000), first)[0, 1]) < 0.1


@given(
    num_rows=st.integers(1, 200),
    global_batch=st.integers(1, 40),
    total=st.integers(1, 500),
    world_size=st.integers(1, 9),
    micro_batch=st.integers(1, 6),
)
@settings(deadline=None)
def test_ranks_share_each_step_without_gap_or_repeat(
    num_rows: int, global_batch: int, total: int, world_size: int, micro_batch: int
) -> None:
    sampler = Sampler(num_rows, 3, global_batch, total)
    everything = []
    for step in range(sampler.num_steps):
        rows = sampler.rows_of_step(step)
        assert len(rows) == global_batch or step == sampler.num_steps - 1
        parts = [
            rank_micro_batches(len(rows), rank=rank, world_size=world_size, micro_batch_size=micro_batch)
            for rank in range(world_size)
        ]
        assert len({len(part) for part in parts}) == 1
        assert all(stop - start <= micro_batch for part in parts for start, stop in part)
        seen = [row for part in parts for start, stop in part for row in rows[start:stop]]
        assert seen == rows.tolist()
        everything += seen
    assert everything == sampler.rows_at(0, total).tolist()
    counts = np.bincount(everything, minlength=num_rows)
    assert counts.max() - counts.min() <= 1


def test_random_access_needs_no_replay() -> None:
    sampler = Sampler(num_rows=10**12, seed=1, global_batch=8, total_rows=10**15)
    assert np.array_equal(sampler.rows_at(10**14, 10**14 + 8), sampler.rows_of_step(10**14 // 8))
