"""What becomes of a sequence longer than a pack (pure)."""

from __future__ import annotations

import numpy as np

from data_shards.config import TooLong
from data_shards.pack import Sequence


def fit(sequence: Sequence, limit: int, policy: TooLong, is_text: bool) -> list[Sequence]:
    """Sequences of at most ``limit`` tokens (at least 8) in place of one, in its order; none where it is dropped.

    Plain text is split, whatever the policy. A conversation is truncated or dropped; under ``error`` the caller is to
    raise before. Every piece has a trained target, but for those of a sequence that has none.
    """
    if len(sequence.input_ids) <= limit:
        return [sequence]
    if is_text:
        return split(sequence, limit)
    return [truncated(sequence, limit)] if policy == TooLong.TRUNCATE else []


def truncated(sequence: Sequence, limit: int) -> Sequence:
    """``limit`` tokens in a row that hold the start of the first answer.

    The end is cut off, unless the prompt leaves the answer less than a quarter of ``limit`` (or than its length, where
    it is shorter). Then the answer gets just that, and the prompt loses its beginning.
    """
    stop = limit
    targets = np.flatnonzero(sequence.trained[1:]) + 1
    if len(targets):
        first = int(targets[0])
        answer = int(np.argmin(np.append(sequence.trained[first:], False)))  # tokens of the first answer
        stop = max(limit, first + min(answer, max(1, limit // 4)))
    return Sequence(sequence.input_ids[stop - limit : stop], sequence.trained[stop - limit : stop])


def split(sequence: Sequence, limit: int) -> list[Sequence]:
    """All tokens, in pieces of ``limit`` but for the last, or the last two."""
    cuts = list(range(limit, len(sequence.input_ids), limit))
    if cuts and cuts[-1] == len(sequence.input_ids) - 1:
        cuts[-1] -= 1  # Alone in its piece, the last token (mostly the stop token) would never be predicted.
    return list(map(Sequence, np.split(sequence.input_ids, cuts), np.split(sequence.trained, cuts)))
