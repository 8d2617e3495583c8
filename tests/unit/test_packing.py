"""Packing: every token once, no pack over its capacity, nothing cut that need not be, little room left."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_shards.writing.bin_packing import best_fit_decreasing, exact_closing
from data_shards.writing.packing import Packing, Piece, best_fit, pack


@st.composite
def lengths_and_capacity(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    capacity = draw(st.integers(1, 300))
    # Mostly short ones, so that packs hold several, and some of exactly the capacity.
    length = st.one_of(st.integers(1, max(1, capacity // 8)), st.integers(1, capacity), st.just(capacity))
    return np.array(draw(st.lists(length, max_size=80)), np.int64), capacity


def _loads(packs: list[list[int]], lengths: np.ndarray) -> np.ndarray:
    return np.array([lengths[pack].sum() for pack in packs], np.int64)


def _fullness(lengths: np.ndarray, num_packs: int, capacity: int) -> float:
    return float(lengths.sum() / (num_packs * capacity))


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


def _one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Best fit as it is defined: the pack of each sequence, longest first."""
    rooms: list[int] = []
    came: list[int] = []  # when each pack came to its room
    pack_of = []
    for now, length in enumerate(sorted(lengths, reverse=True)):
        fitting = [pack for pack, room in enumerate(rooms) if room >= length]
        if fitting:
            chosen = min(fitting, key=lambda pack: (rooms[pack], -came[pack]))
        else:
            chosen = len(rooms)
            rooms.append(capacity)
            came.append(now)
        rooms[chosen] -= length
        came[chosen] = now
        pack_of.append(chosen)
    return pack_of


@given(case=lengths_and_capacity())
@settings(deadline=None)
def test_best_fit_by_counts_is_best_fit_one_by_one(case: tuple[np.ndarray, int]) -> None:
    lengths, capacity = case
    counts = np.bincount(lengths, minlength=capacity + 1)
    assert best_fit_decreasing(counts, capacity).tolist() == _one_by_one(lengths.tolist(), capacity)


@given(case=lengths_and_capacity())
@settings(deadline=None)
def test_the_way_that_needs_fewer_packs_is_taken(case: tuple[np.ndarray, int]) -> None:
    lengths, capacity = case
    counts = np.bincount(lengths, minlength=capacity + 1)
    ways = [best_fit_decreasing(counts, capacity), exact_closing(counts, capacity)]
    for pack_of in ways:
        loads = np.bincount(pack_of, weights=np.sort(lengths)[::-1])
        assert (loads > 0).all() and (loads <= capacity).all()
    assert len(best_fit(lengths, capacity)) == min(way.max(initial=-1) + 1 for way in ways)


def test_pairs_close_what_best_fit_leaves_open() -> None:
    # Best fit: 6+5, 5+4+3, 4+3+3, 3. By pairs: 6+3+3, 5+4+3, 5+4+3.
    lengths = np.array([6, 5, 5, 4, 4, 3, 3, 3, 3])
    assert len(set(_one_by_one(lengths.tolist(), 12))) == 4
    assert sorted(map(sum, (lengths[pack] for pack in best_fit(lengths, 12)))) == [12, 12, 12]


@given(case=lengths_and_capacity(), kind=st.sampled_from([np.int32, np.int64, list]))
@settings(deadline=None)
def test_result_depends_on_the_lengths_alone(case: tuple[np.ndarray, int], kind: type) -> None:
    lengths, capacity = case
    same = lengths.tolist() if kind is list else lengths.astype(kind)
    assert best_fit(same, capacity) == best_fit(lengths, capacity)


def test_ties_go_by_index() -> None:
    assert best_fit(np.array([5, 5, 5, 3, 3, 3]), 8) == [[0, 5], [1, 4], [2, 3]]
    assert best_fit(np.array([2, 8, 6]), 8) == [[1], [2, 0]]


def _long_tailed(kind: str, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if kind == "log-normal":
        drawn = rng.lognormal(mean=5.3, sigma=0.9, size=count)
    else:
        drawn = 30.0 * rng.zipf(1.5, size=count) + rng.integers(0, 30, size=count)
    return np.clip(drawn, 8, 2048).astype(np.int64)


@pytest.mark.parametrize("kind", ["log-normal", "zipf"])
@pytest.mark.parametrize("count", [4_000, 100_000])
@pytest.mark.parametrize("seed", range(3))
def test_long_tailed_lengths_leave_under_half_a_percent_empty(kind: str, count: int, seed: int) -> None:
    lengths = _long_tailed(kind, count, seed)
    # The tail is there: the longest are full packs, the median is a tenth of one.
    assert (lengths == 2048).any() and np.median(lengths) < 250
    assert _fullness(lengths, len(best_fit(lengths, 2048)), 2048) >= 0.995


@pytest.mark.parametrize("capacity", [1024, 2048])
def test_gsm8k_fills_packs_to_99_percent(capacity: int, gsm8k_lengths: np.ndarray) -> None:
    assert gsm8k_lengths.size == 7473 and gsm8k_lengths.max() <= capacity
    packs = pack(gsm8k_lengths, capacity, Packing.BEST_FIT)
    assert all(piece == (piece.index, 0, gsm8k_lengths[piece.index]) for pieces in packs for piece in pieces)
    assert _fullness(gsm8k_lengths, len(packs), capacity) >= 0.99


@pytest.fixture(scope="module")
def gsm8k_lengths() -> np.ndarray:
    """Tokens of each training record as a conversation; the byte-pair tokenizer is trained on the test file."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    shared = os.environ.get("BATON_SHARED")
    if shared is None:
        pytest.skip("BATON_SHARED is not set, so there is no GSM8K here")
    folder = Path(shared) / "data" / "gsm8k"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((folder / "test.jsonl").read_text().splitlines(), trainer)
    records = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    texts = [
        f"<|im_start|>user\n{record['question']}<|im_end|>\n<|im_start|>assistant\n{record['answer']}<|im_end|>\n"
        for record in records
    ]
    return np.array([len(encoding) for encoding in tokenizer.encode_batch_fast(texts)])


@pytest.mark.parametrize(("lengths", "capacity"), [([9], 8), ([3, 0], 8), ([-1], 8), ([], 0)])
def test_length_that_no_pack_can_hold_is_refused(lengths: list[int], capacity: int) -> None:
    for how in set(Packing) - ({Packing.CONCATENATE} if lengths == [9] else set()):
        with pytest.raises(ValueError, match=r"a pack (holds 8|must hold at least one token)"):
            pack(np.array(lengths, np.int64), capacity, how)


@given(case=lengths_and_capacity(), how=st.sampled_from(Packing))
@settings(deadline=None)
def test_every_way_holds_every_token_once(case: tuple[np.ndarray, int], how: Packing) -> None:
    lengths, capacity = case
    packs = pack(lengths, capacity, how)
    assert all(packs) and all(sum(piece.stop - piece.start for piece in pieces) <= capacity for pieces in packs)
    found = sorted(piece for pieces in packs for piece in pieces)
    for index, length in enumerate(lengths.tolist()):
        mine = [piece for piece in found if piece.index == index]
        assert [piece.start for piece in mine] == [0, *(piece.stop for piece in mine[:-1])]
        assert mine[-1].stop == length and all(piece.start < piece.stop for piece in mine)
        assert len(mine) == 1 or how == Packing.CONCATENATE, "a sequence is cut that fits"


@given(case=lengths_and_capacity())
@settings(deadline=None)
def test_sequential_keeps_the_order_and_closes_a_pack_only_for_one_that_does_not_fit(
    case: tuple[np.ndarray, int],
) -> None:
    lengths, capacity = case
    packs = [[piece.index for piece in pieces] for pieces in pack(lengths, capacity, Packing.SEQUENTIAL)]
    assert [index for indices in packs for index in indices] == list(range(len(lengths)))
    for before, after in pairwise(packs):
        assert lengths[before].sum() + lengths[after[0]] > capacity


def test_one_per_row_is_one_per_row() -> None:
    assert list(pack([3, 8, 1], 8, Packing.ONE_PER_ROW)) == [[Piece(0, 0, 3)], [Piece(1, 0, 8)], [Piece(2, 0, 1)]]


@given(
    lengths=st.lists(st.one_of(st.integers(1, 5), st.integers(1, 90)), max_size=60),
    capacity=st.integers(1, 30),
)
@settings(deadline=None)
def test_concatenation_keeps_the_order_and_strands_no_token(lengths: list[int], capacity: int) -> None:
    packs = list(pack(lengths, capacity, Packing.CONCATENATE))
    pieces = [piece for each in packs for piece in each]
    assert pieces == sorted(pieces)
    if capacity < 3:
        return
    # At most two places stay empty, and only so that no piece of a cut sequence is a token alone.
    assert all(sum(piece.stop - piece.start for piece in each) >= capacity - 2 for each in packs[:-1])
    assert all(piece.stop - piece.start > 1 or lengths[piece.index] == 1 for piece in pieces)


def test_concatenation_by_example() -> None:
    assert list(pack([5, 10, 1], 8, Packing.CONCATENATE)) == [
        [Piece(0, 0, 5), Piece(1, 0, 3)],
        [Piece(1, 3, 10), Piece(2, 0, 1)],
    ]
    # 5 + 3 would leave the last token of the second alone; 7 would leave its first.
    assert list(pack([5, 4], 8, Packing.CONCATENATE)) == [[Piece(0, 0, 5), Piece(1, 0, 2)], [Piece(1, 2, 4)]]
    assert list(pack([7, 4], 8, Packing.CONCATENATE)) == [[Piece(0, 0, 7)], [Piece(1, 0, 4)]]
