"""Promise 1: which rows a step gets depends on nothing but seed, batch and step."""

from __future__ import annotations

import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.order.sampler import SAMPLER_VERSION, Order, Sampler, SourceRows, permute
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


@given(num_rows=st.integers(1, 300), seed=st.integers(-(2**70), 2**70), data=st.data())
@settings(deadline=None)
def test_epochs_can_be_asked_for_together(num_rows: int, seed: int, data: st.DataObject) -> None:
    index = np.array(data.draw(st.lists(st.integers(0, num_rows - 1), max_size=20)), np.int64)
    epoch = np.array(data.draw(st.lists(st.integers(0, 2**50), min_size=len(index), max_size=len(index))), np.int64)
    one_by_one = [permute(index[i : i + 1], num_rows, seed, int(epoch[i]))[0] for i in range(len(index))]
    assert permute(index, num_rows, seed, epoch).tolist() == one_by_one


@pytest.mark.parametrize(
    ("sampler", "start", "rows"),
    [
        (
            Sampler(10, 0, 4, 30),
            0,
            [8, 0, 4, 2, 3, 1, 6, 7, 9, 5, 3, 1, 0, 4, 7, 5, 2, 6, 9, 8, 4, 5, 7, 8, 2, 3, 1, 9, 6, 0],
        ),
        (Sampler(5, 123456789, 3, 20), 0, [1, 4, 0, 3, 2, 2, 0, 3, 4, 1, 4, 3, 2, 1, 0, 4, 0, 1, 3, 2]),
        (Sampler(1, 7, 1, 3), 0, [0, 0, 0]),
        (
            Sampler(1000, 7, 8, 10000),
            995,
            [987, 621, 643, 893, 355, 761, 25, 699, 584, 142, 503, 375, 629, 991, 299],
        ),
        (
            Sampler(10**9, 2**40 + 1, 8, 10**10),
            10**9 - 3,
            [806526298, 298198202, 601608116, 183773275, 994059649, 433144044, 615778760, 662202597],
        ),
        (
            Sampler(2**30 + 1, 42, 8, 10**15),
            10**14,
            [27766555, 445509325, 1048316720, 305090217, 681424379, 1063114210],
        ),
    ],
)
def test_order_of_version_1_never_changes(sampler: Sampler, start: int, rows: list[int]) -> None:
    assert SAMPLER_VERSION == 1
    assert sampler.rows_at(start, start + len(rows)).tolist() == rows


def test_twenty_thousand_positions_of_version_1_never_change() -> None:
    rows = Sampler(4096 + 17, 3, 8, 20_000).rows_at(0, 20_000)
    assert xxhash.xxh3_64(rows.astype("<i8").tobytes()).hexdigest() == "cccdf5e3777cd041"


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
        seen = _dealt_out(rows, world_size, micro_batch)
        assert seen == rows.tolist()
        everything += seen
    assert everything == sampler.rows_at(0, total).tolist()
    counts = np.bincount(everything, minlength=num_rows)
    assert counts.max() - counts.min() <= 1


def _dealt_out(rows: np.ndarray, world_size: int, micro_batch: int) -> list[int]:
    """The rows that the ranks train on in one step, rank by rank, as ``train_step`` deals them out."""
    parts = [
        rank_micro_batches(len(rows), rank=rank, world_size=world_size, micro_batch_size=micro_batch)
        for rank in range(world_size)
    ]
    assert len({len(part) for part in parts}) == 1
    assert all(stop - start <= micro_batch for part in parts for start, stop in part)
    return [int(row) for part in parts for start, stop in part for row in rows[start:stop]]


class Attempt(NamedTuple):
    """One life of the workers: it does some steps, and the last few of them are lost with it."""

    world_size: int
    micro_batch: int
    steps: int
    lost: int


ATTEMPTS = st.lists(
    st.builds(Attempt, st.integers(1, 8), st.integers(1, 5), st.integers(1, 12), st.integers(0, 5)), max_size=4
)


@given(
    num_rows=st.integers(1, 40),
    epochs=st.integers(1, 3),
    global_batch=st.integers(3, 24),
    seed=st.integers(0, 2**32),
    order=st.sampled_from(Order),
    attempts=ATTEMPTS,
    last=st.builds(Attempt, st.integers(1, 8), st.integers(1, 5), st.just(10**6), st.just(0)),
)
@settings(deadline=None, max_examples=2000)
def test_each_epoch_visits_every_row_once_over_resumes_and_resizes(
    num_rows: int,
    epochs: int,
    global_batch: int,
    seed: int,
    order: Order,
    attempts: list[Attempt],
    last: Attempt,
) -> None:
    total = num_rows * epochs
    kept: list[list[int]] = []  # by step
    for attempt in [*attempts, last]:
        sampler = Sampler(num_rows, seed, global_batch, total, order)
        for step in range(len(kept), min(len(kept) + attempt.steps, sampler.num_steps)):
            kept.append(_dealt_out(sampler.rows_of_step(step), attempt.world_size, attempt.micro_batch))
        del kept[max(0, len(kept) - attempt.lost) :]
    assert [len(rows) for rows in kept[:-1]] == [global_batch] * (len(kept) - 1)
    by_epoch = np.concatenate(kept).reshape(epochs, num_rows)
    assert np.array_equal(np.sort(by_epoch, axis=1), np.tile(np.arange(num_rows), (epochs, 1)))


def test_random_access_needs_no_replay_and_no_memory() -> None:
    sampler = Sampler(num_rows=10**12, seed=1, global_batch=8, total_rows=10**15)
    tracemalloc.start()
    rows = sampler.rows_of_step(10**14 // 8)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(sampler.rows_at(10**14, 10**14 + 8), rows)
    assert peak_bytes < 200_000  # of one block of positions, however many rows there are


def test_there_is_nothing_behind_the_end() -> None:
    sampler = Sampler(num_rows=19, seed=1, global_batch=6, total_rows=20)
    assert [len(sampler.rows_of_step(step)) for step in range(7)] == [6, 6, 6, 2, 0, 0, 0]


def test_the_files_order_is_the_files_order() -> None:
    sampler = Sampler(num_rows=5, seed=3, global_batch=4, total_rows=13, order=Order.FILE)
    assert sampler.rows_at(0, 13).tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1, 2]
    assert sampler.rows_of_step(3).tolist() == [2]


def test_sources_without_weights_change_nothing() -> None:
    sources = (SourceRows("a", 30, None), SourceRows("b", 70, None))
    plain, named = Sampler(100, 3, 7, 250), Sampler(100, 3, 7, 250, sources=sources)
    assert np.array_equal(plain.rows_at(0, 250), named.rows_at(0, 250))
    with pytest.raises(ValueError, match="with weights"):
        named.repeats("a", 10)


@pytest.mark.parametrize("bad", [{"num_rows": 0}, {"global_batch": 0}, {"total_rows": 0}])
def test_a_sampler_of_nothing_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Sampler(**{"num_rows": 5, "seed": 0, "global_batch": 2, "total_rows": 5} | bad)


def test_sources_must_add_up() -> None:
    with pytest.raises(ValueError, match="do not add up"):
        Sampler(5, 0, 2, 5, sources=(SourceRows("a", 4, 1.0),))
