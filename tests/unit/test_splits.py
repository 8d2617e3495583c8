"""Splits by content: adding data never moves a record, folds are even and independent of what is held out."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_shards.splits import TRAIN, VALIDATION, fold_of, split_of, split_of_fold

CONTENTS = [f"record {number}".encode() for number in range(20_000)]
DIGESTS = [xxhash.xxh3_128(content).digest() for content in CONTENTS]
POSITIONS = [xxhash.xxh3_64(content).intdigest() / 2**64 for content in CONTENTS]

digests = st.binary(min_size=16, max_size=16)


@given(digest=digests, folds=st.integers(2, 1000))
def test_every_record_is_in_one_fold_and_held_out_once(digest: bytes, folds: int) -> None:
    assert 0 <= fold_of(digest, folds) < folds
    held_out = [split_of_fold(digest, folds, fold) for fold in range(folds)]
    assert held_out.count(VALIDATION) == 1 and held_out.count(TRAIN) == folds - 1


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
def test_folds_are_even(folds: int) -> None:
    counts = np.bincount([fold_of(digest, folds) for digest in DIGESTS], minlength=folds)
    expected = len(DIGESTS) / folds
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("folds", [2, 5])
def test_what_is_held_out_beforehand_takes_the_same_share_of_each_fold(folds: int) -> None:
    held_out = np.zeros(folds)
    for digest, position in zip(DIGESTS, POSITIONS, strict=True):
        held_out[fold_of(digest, folds)] += split_of(position, 0.1) == VALIDATION
    expected = len(DIGESTS) * 0.1 / folds
    assert (np.abs(held_out - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("size", [10, 300])  # the hashes take other ways above 240 bytes
def test_a_fold_uses_other_bits_than_the_fractional_split(size: int) -> None:
    contents = [content.ljust(size, b".") for content in CONTENTS[:4000]]
    folds = [fold_of(xxhash.xxh3_128(content).digest(), 2) for content in contents]
    halves = [xxhash.xxh3_64(content).intdigest() >> 63 for content in contents]
    assert abs(np.corrcoef(folds, halves)[0, 1]) < 0.08


@given(position=st.floats(0, 1, exclude_max=True), fractions=st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_a_larger_fraction_only_moves_records_to_validation(position: float, fractions: tuple[float, float]) -> None:
    smaller, larger = sorted(fractions)
    if split_of(position, smaller) == VALIDATION:
        assert split_of(position, larger) == VALIDATION
    assert split_of(position, 0.0) == TRAIN and split_of(position, 1.0) == VALIDATION


def test_the_fraction_is_met() -> None:
    share = np.mean([split_of(position, 0.05) == VALIDATION for position in POSITIONS])
    assert abs(share - 0.05) < 0.008


def test_folds_never_change() -> None:
    assert [fold_of(digest, 5) for digest in DIGESTS[:12]] == PINNED


PINNED = [4, 2, 3, 0, 1, 1, 1, 3, 0, 2, 2, 0]


@pytest.mark.parametrize(("size", "folds"), [(8, 5), (0, 5), (16, 1), (16, 0)])
def test_a_fold_of_nothing_is_refused(size: int, folds: int) -> None:
    with pytest.raises(ValueError, match="at least two folds"):
        fold_of(bytes(size), folds)


def test_a_fold_beyond_the_last_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of 0-4"):
        split_of_fold(DIGESTS[0], 5, 5)
