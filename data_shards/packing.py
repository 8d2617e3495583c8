"""Which sequences share a pack, and where they are cut (pure: functions of the lengths alone)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data_shards.bin_packing import fewest_packs


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


def pack(lengths: np.ndarray | Sequence[int], capacity: int, how: Packing) -> list[list[Piece]]:
    """Packs of at most ``capacity`` tokens that together hold every token once.

    Args:
        lengths: int ``[n]``, each at least 1 and, except to concatenate, at most ``capacity``.

    Raises:
        ValueError: a length that no pack can hold.
    """
    if how == Packing.CONCATENATE:
        return _concatenate(_checked(lengths, capacity, longest=None).tolist(), capacity)
    checked = _checked(lengths, capacity, longest=capacity)
    sizes: list[int] = checked.tolist()
    return [[Piece(index, 0, sizes[index]) for index in indices] for indices in _whole(checked, capacity, how)]


def _whole(lengths: np.ndarray, capacity: int, how: Packing) -> Iterable[Iterable[int]]:
    if how == Packing.BEST_FIT:
        return best_fit(lengths, capacity)
    return _next_fit(lengths, capacity) if how == Packing.SEQUENTIAL else ((index,) for index in range(len(lengths)))


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
    lengths = _checked(lengths, capacity, longest=capacity)
    longest_first = np.argsort(-lengths, kind="stable")
    pack_of = fewest_packs(np.bincount(lengths, minlength=capacity + 1), capacity)  # [n], as longest_first
    members = longest_first[np.argsort(pack_of, kind="stable")].tolist()
    bounds = np.cumsum(np.bincount(pack_of)).tolist()
    return [members[start:stop] for start, stop in pairwise([0, *bounds])]


def _next_fit(lengths: np.ndarray, capacity: int) -> Iterator[range]:
    ends = np.cumsum(lengths).tolist()
    start = before = 0
    while start < len(ends):
        stop = bisect_right(ends, before + capacity, lo=start)
        yield range(start, stop)
        start, before = stop, ends[stop - 1]


def _concatenate(lengths: list[int], capacity: int) -> list[list[Piece]]:
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
    return packs


def _cut(left: int, room: int, capacity: int) -> int:
    """How many of the ``left`` tokens of a sequence go into the ``room`` of the open pack; 0: it is to be closed.

    A token alone in its piece is neither predicted nor helps to predict another, so no cut leaves one on either side
    while a pack can hold three; one or two places stay empty instead.
    """
    if left <= room:
        return left
    size = room - 1 if left - room == 1 and capacity > 2 else room
    return size if size > 1 or capacity < 3 else 0
