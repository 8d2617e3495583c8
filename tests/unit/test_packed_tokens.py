"""Packs with their tokens: the same rows as by joining the pieces one by one, and shards of as many rows as fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_shards.pack import Sequence
from data_shards.storage import Storage
from data_shards.writing.packed_tokens import PackedTokens
from data_shards.writing.packing import Packing, Piece, pack
from data_shards.writing.shard_writer import write_shards

CAPACITY = 12


def packed(lengths: list[int], how: Packing, seed: int = 0) -> PackedTokens:
    rng = np.random.default_rng(seed)
    sizes = np.array(lengths, np.int64)
    ids, trained = rng.integers(0, 99, sizes.sum()).astype(np.int32), rng.integers(0, 2, sizes.sum()).astype(bool)
    return PackedTokens(ids, trained, np.cumsum(sizes) - sizes, pack(sizes, CAPACITY, how))


def sequence_of(made: PackedTokens, piece: Piece) -> Sequence:
    first = int(made.first_token[piece.index])
    tokens = slice(first + piece.start, first + piece.stop)
    return Sequence(made.input_ids[tokens], made.trained[tokens])


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, CAPACITY), min_size=1, max_size=30),
    how=st.sampled_from(Packing),
    cut=st.tuples(st.integers(0, 29), st.integers(1, 30)),
)
def test_rows_are_their_pieces_joined(lengths: list[int], how: Packing, cut: tuple[int, int]) -> None:
    made = packed(lengths, how)
    wanted = [[sequence_of(made, piece) for piece in pieces] for pieces in made.packs]
    assert made.num_targets.tolist() == [sum(each.num_targets for each in row) for row in wanted]
    assert made.num_tokens.tolist() == [sum(len(each.input_ids) for each in row) for row in wanted]
    first = min(cut[0], len(made) - 1)
    last = min(first + cut[1], len(made))
    rows = made.rows(first, last)
    assert len(rows.offsets) == len(rows.sequence_offsets) == last - first + 1
    for index, row in enumerate(wanted[first:last]):
        tokens = slice(rows.offsets[index], rows.offsets[index + 1])
        sequences = slice(rows.sequence_offsets[index], rows.sequence_offsets[index + 1])
        assert rows.input_ids[tokens].tolist() == np.concatenate([each.input_ids for each in row]).tolist()
        assert rows.trained[tokens].tolist() == np.concatenate([each.trained for each in row]).tolist()
        assert rows.sequence_lengths[sequences].tolist() == [len(each.input_ids) for each in row]


@pytest.mark.parametrize(
    ("max_shard_tokens", "rows"), [(12, [1, 1, 1, 1]), (5, [1, 1, 1, 1]), (21, [2, 1, 1]), (22, [2, 2]), (99, [4])]
)
def test_shard_holds_as_many_rows_as_fit_and_at_least_one(
    max_shard_tokens: int, rows: list[int], tmp_path: Path
) -> None:
    made = packed([9, 12, 10, 12], Packing.SEQUENTIAL)
    shards = list(write_shards(Storage.at(tmp_path), "train", made, max_shard_tokens, first=3))
    assert [shard.rows for shard in shards] == rows
    assert [shard.file.path for shard in shards] == [f"train-{number:05d}.arrow" for number in range(3, 3 + len(rows))]


def test_nothing_to_write() -> None:
    made = packed([], Packing.BEST_FIT)
    assert len(made) == 0 and made.num_targets.tolist() == made.num_tokens.tolist() == []
