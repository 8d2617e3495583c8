"""Sequences longer than a pack: nothing stays too long, nothing is reordered, something is always learnt."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.config import TooLong
from data_shards.encoding.too_long import fit
from data_shards.pack import Sequence


def conversation(*runs: int) -> Sequence:
    """Runs of tokens by turns: a prompt, an answer, a prompt, …; ids count up, so that they tell their place."""
    trained = np.concatenate([np.full(run, index % 2 == 1) for index, run in enumerate(runs)])
    return Sequence(np.arange(len(trained), dtype=np.int32), trained)


sequences = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(lambda runs: conversation(*runs))


@given(sequences, st.integers(8, 64), st.sampled_from(TooLong), st.booleans())
def test_pieces_fit_and_keep_their_order(sequence: Sequence, limit: int, policy: TooLong, is_text: bool) -> None:
    pieces = fit(sequence, limit, policy, is_text)
    if len(sequence.input_ids) <= limit:
        assert pieces == [sequence]
    places = [place for piece in pieces for place in piece.input_ids.tolist()]
    assert places == sorted(set(places))
    for piece in pieces:
        assert 1 <= len(piece.input_ids) == len(piece.trained) <= limit
        assert piece.trained.tolist() == sequence.trained[piece.input_ids].tolist()
        assert np.diff(piece.input_ids).tolist() == [1] * (len(piece.input_ids) - 1)


@given(sequences, st.integers(8, 64))
def test_truncated_keeps_the_start_of_the_first_answer(sequence: Sequence, limit: int) -> None:
    (piece,) = fit(sequence, limit, TooLong.TRUNCATE, False)
    assert len(piece.input_ids) == min(limit, len(sequence.input_ids))
    targets = np.flatnonzero(sequence.trained[1:]) + 1
    assert bool(piece.num_targets) == bool(len(targets))
    if len(targets):
        first = targets[0]
        answer = int(np.cumprod(sequence.trained[first:]).sum())
        wanted = range(first, first + min(answer, limit // 4))
        assert set(wanted) <= set(piece.input_ids.tolist())
        # The prompt loses its beginning only for an answer that would have less.
        if wanted.stop <= limit:
            assert piece.input_ids[0] == 0


@pytest.mark.parametrize(
    ("runs", "kept"),
    [
        ((10, 90), (0, 40)),  # the answer loses its end
        ((60, 90), (30, 70)),  # the prompt loses its beginning: a quarter of 40 is the answer's
        ((60, 4, 90), (24, 64)),  # the whole answer, if it is shorter
        ((35, 4, 90), (0, 40)),  # whole already
        ((100,), (0, 40)),  # no answer
    ],
)
def test_what_truncation_keeps(runs: tuple[int, ...], kept: tuple[int, int]) -> None:
    (piece,) = fit(conversation(*runs), 40, TooLong.TRUNCATE, False)
    assert piece.input_ids.tolist() == list(range(*kept))


@pytest.mark.parametrize("policy", TooLong)
@given(length=st.integers(1, 200), limit=st.integers(8, 64))
def test_text_is_split_without_loss_and_each_piece_teaches(policy: TooLong, length: int, limit: int) -> None:
    text = Sequence(np.arange(length, dtype=np.int32), np.ones(length, bool))
    pieces = fit(text, limit, policy, True)
    assert np.concatenate([piece.input_ids for piece in pieces]).tolist() == list(range(length))
    assert length == 1 or all(piece.num_targets for piece in pieces)
    assert len(pieces) == -(-length // limit)


@pytest.mark.parametrize("policy", [TooLong.DROP, TooLong.ERROR])
def test_conversations_are_dropped_else(policy: TooLong) -> None:
    assert fit(conversation(10, 90), 40, policy, False) == []
    assert len(fit(conversation(10, 30), 40, policy, False)) == 1
