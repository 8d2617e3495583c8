"""Which sequences share a pack, and where they are cut (pure: functions of the lengths alone)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np

from data_shards.writing.bin_packing import fewest_packs


class Packing(StrEnum):
    BEST_FIT = "best_fit"
    """whole sequences in as few packs as can be; their order is given up"""
    ONE_PER_ROW = "one_per_row"
    """each sequence alone in its pack; batches are not padded, so that costs rows, not tokens"""
    SEQUENTIAL = "sequential"
    """whole sequences in their order; a pack ends where the next one does not fit (next fit)"""
    CONCATENATE = "concatenate"
    """raw text: joined end to end and cut at the capacity, each piece attending to itself alone"""


class Piece(NamedTuple):
    """Tokens ``[start, stop)`` of sequence ``index``."""

    index: int  # type: ignore[assignment]  # over tuple.index, which nobody needs here
    start: int
    stop: int


@dataclass(frozen=True)
class Packs:
    """R packs of P pieces together: pack r holds the pieces ``[bounds[r], bounds[r + 1])``, in this order."""

    index: np.ndarray
    """int64 [P]: the sequence that a piece is of"""
    start: np.ndarray
    """int64 [P]"""
    stop: np.ndarray
    """int64 [P]"""
    bounds: np.ndarray
    """int64 [R + 1]"""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __iter__(self) -> Iterator[list[Piece]]:
        pieces = list(map(Piece, self.index.tolist(), self.start.tolist(), self.stop.tolist()))
        return (pieces[first:last] for first, last in pairwise(self.bounds.tolist()))


def pack(lengths: np.ndarray | Sequence[int], capacity: int, how: Packing) -> Packs:
    """Packs of at most ``capacity`` tokens that together hold every token once.

    Args:
        lengths: int ``[n]``, each at least 1 and, except to concatenate, at most ``capacity``.

    Raises:
        ValueError: a length that no pack can hold.
    """
    if how == Packing.CONCATENATE:
        return _concatenate(_checked(lengths, capacity, longest=None).tolist(), capacity)
    checked = _checked(lengths, capacity, longest=capacity)
    index, bounds = _whole(checked, capacity, how)
    return Packs(index, np.zeros_like(index), checked[index], bounds)


def _whole(lengths: np.ndarray, capacity: int, how: Packing) -> tuple[np.ndarray, np.ndarray]:
    """Index of each sequence, in the packs' order, and ``Packs.bounds``."""
    if how == Packing.BEST_FIT:
        return _best_fit(lengths, capacity)
    in_order = np.arange(len(lengths))
    return in_order, _next_fit(lengths, capacity) if how == Packing.SEQUENTIAL else np.arange(len(lengths) + 1)


def _checked(lengths: np.ndarray | Sequence[int], capacity: int, *, longest: int | None) -> np.ndarray:
    lengths = np.asarray(lengths, np.int64)
    if capacity < 1:
        raise ValueError(f"a pack must hold at least one token, not {capacity}")
    if lengths.size and (lengths.min() < 1 or (longest is not None and lengths.max() > longest)):
        raise ValueError(f"lengths span {lengths.min()}-{lengths.max()}, a pack holds {capacity}")
    return lengths


def best_fit(lengths: np.ndarray | Sequence[int], capacity: int) -> list[list[int]]:
    """Pack whole sequences by best fit, longest first, or by a second way where that needs fewer packs
    (``bin_packing.py``).

    Args:
        lengths: int ``[n]``, each in [1, capacity].

    Returns:
        Packs as lists of indices into ``lengths``, longest sequence first; together they hold each index once. Of equal
        lengths the lower index is placed first, so the result is a function of ``lengths`` alone.
    """
    index, bounds = _best_fit(_checked(lengths, capacity, longest=capacity), capacity)
    members = index.tolist()
    return [members[start:stop] for start, stop in pairwise(bounds.tolist())]


def _best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    longest_first = np.argsort(-lengths, kind="stable")
    pack_of = fewest_packs(np.bincount(lengths, minlength=capacity + 1), capacity)  # [n], as longest_first
    return longest_first[np.argsort(pack_of, kind="stable")], _bounds(np.bincount(pack_of))


def _bounds(sizes: np.ndarray) -> np.ndarray:
    """Of R packs of these numbers of pieces: int64 ``[R + 1]``."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])


def _next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    ends = np.cumsum(lengths).tolist()
    bounds = [0]
    before = 0
    while bounds[-1] < len(ends):
        bounds.append(bisect_right(ends, before + capacity, lo=bounds[-1]))
        before = ends[bounds[-1] - 1]
    return np.array(bounds, np.int64)


def _concatenate(lengths: list[int], capacity: int) -> Packs:
    packs: list[list[Piece]] = []
    room = 0
    for index, length in enumerate(lengths):
        start = 0
        while start < length:
            size = _cut(length - start, room, capacity)
            if size == 0:
                packs.append([])
                room = capacity
                continue
            packs[-1].append(Piece(index, start, start + size))
            start, room = start + size, room - size
    pieces = np.array(list(chain.from_iterable(packs)), np.int64).reshape(-1, 3)
    return Packs(pieces[:, 0], pieces[:, 1], pieces[:, 2], _bounds(np.array(list(map(len, packs)), np.int64)))


def _cut(left: int, room: int, capacity: int) -> int:
    """How many of the ``left`` tokens of a sequence go into the ``room`` of the open pack; 0: it is to be closed.

    A token alone in its piece is neither predicted nor helps to predict another, so no cut leaves one on either side
    while a pack can hold three; one or two places stay empty instead.
    """
    if left <= room:
        return left
    size = room - 1 if left - room == 1 and capacity > 2 else room
    return size if size > 1 or capacity < 3 else 0
