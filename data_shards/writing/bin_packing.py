"""Two ways to put lengths into as few packs as can be (pure).

Both work by how many sequences there are of each length rather than sequence by sequence, so a million lengths take
fractions of a second. ``counts`` is int ``[capacity + 1]``, how many of each length; the result ``pack_of`` is int64
``[n]``, the pack of each sequence, longest first.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter

import numpy as np


def fewest_packs(counts: np.ndarray, capacity: int) -> np.ndarray:
    """``pack_of`` by whichever of the two needs fewer packs, best fit where they need the same."""
    plain, closing = best_fit_decreasing(counts, capacity), exact_closing(counts, capacity)
    return closing if closing.max(initial=-1) < plain.max(initial=-1) else plain


def best_fit_decreasing(counts: np.ndarray, capacity: int) -> np.ndarray:
    """Longest first, each where the least room is left that holds it (Ding et al., arXiv 2404.10830).

    Of packs with the same room the one that came to it last is taken. The least room that holds a length is, once it
    holds one more, still the least as long as it holds another: so a pack is filled up before the next one is taken,
    and sequences of one length are placed together.
    """
    pack_of: list[int] = []
    packs = _OpenPacks(capacity)
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            room = packs.least_room(length)
            each = room // length
            taken = packs.take(room, -(-left // each))
            placed = min(left, each * len(taken))
            filled, rest = divmod(placed, each)
            pack_of += [index for index in taken for _ in range(each)][:placed]
            packs.put(taken[:filled], room - each * length)
            packs.put(taken[filled:], room - rest * length)
            left -= placed
    return np.array(pack_of, np.int64)


class _OpenPacks:
    """Packs with room left, by how much."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._by_room: dict[int, list[int]] = {}
        self._rooms: list[int] = []  # the keys of _by_room, sorted: fewer than ``capacity``
        self._opened = 0

    def least_room(self, length: int) -> int:
        """The least room that holds ``length``; the capacity stands for a new pack."""
        place = bisect_left(self._rooms, length)
        return self._rooms[place] if place < len(self._rooms) else self._capacity

    def take(self, room: int, most: int) -> list[int]:
        """At least one and at most ``most`` packs with just this room, the last one put first."""
        if room == self._capacity:
            self._opened += most
            return list(range(self._opened - most, self._opened))
        packs = self._by_room[room]
        taken = packs[: -most - 1 : -1]
        del packs[-most:]
        if not packs:
            del self._by_room[room]
            self._rooms.pop(bisect_left(self._rooms, room))
        return taken

    def put(self, packs: list[int], room: int) -> None:
        if not room or not packs:
            return
        if room not in self._by_room:
            self._by_room[room] = []
            insort(self._rooms, room)
        self._by_room[room] += packs


def exact_closing(counts: np.ndarray, capacity: int) -> np.ndarray:
    """Pack by pack: the longest left, then one or two that fill the rest exactly, else the longest that fits.

    Best fit places the short ones last, where they leave gaps that nothing is short enough for; looking for two at once
    (as best two fit does: Friesen and Langston, SIAM J. Discrete Math. 4, 1991) leaves few. Of the pairs that fill the
    rest the one closest in length is taken: the short ones are worth keeping. A filling is used for as many packs as
    there are sequences for.
    """
    pack_of = np.empty(int(counts.sum()), np.int64)
    # Where in pack_of the first sequence of each length stands that is not placed yet.
    place = (len(pack_of) - np.cumsum(counts)).tolist()
    left = _LengthsLeft(counts, capacity)
    opened = 0
    while left:
        filling = _filling(left, capacity)
        again = left.times(filling)
        packs = np.arange(opened, opened + 1 + again) if again else opened
        for length, number in filling.items():
            left.take(length, number * again)
            start = place[length]
            place[length] += number * (1 + again)
            pack_of[start : place[length]] = np.repeat(packs, number) if again else packs
        opened += 1 + again
    return pack_of


class _LengthsLeft:
    """How many sequences of each length are left. Which lengths those are is also kept as the bits of two integers,
    so that a search over all of them is a few operations on machine words."""

    def __init__(self, counts: np.ndarray, capacity: int) -> None:
        self._counts: list[int] = counts.tolist()
        self._capacity = capacity
        self._there = _bits(counts > 0)
        """bit ``length``"""
        self._mirrored = _bits(counts[::-1] > 0)
        """bit ``capacity - length``"""

    def __bool__(self) -> bool:
        return self._there != 0

    def take(self, length: int, number: int) -> None:
        self._counts[length] -= number
        if number and not self._counts[length]:
            self._there ^= 1 << length
            self._mirrored ^= 1 << (self._capacity - length)

    def times(self, filling: Counter[int]) -> int:
        """For how many packs of this filling there are sequences left."""
        return min(self._counts[length] // number for length, number in filling.items())

    def longest(self, room: int) -> int:
        """The longest that is no longer than ``room``; 0: none."""
        return max(0, (self._there & ((2 << room) - 1)).bit_length() - 1)

    def pair(self, room: int) -> tuple[int, int] | None:
        """The two that are ``room`` tokens together, closest in length."""
        half = room // 2
        # Bit a of the first is there; bit a of the second, where room - a is there.
        shorter = self._there & (self._mirrored >> (self._capacity - room)) & ((2 << half) - 1)
        if 2 * half == room and self._counts[half] == 1:
            shorter &= ~(1 << half)
        length = shorter.bit_length() - 1
        return (length, room - length) if shorter else None


def _filling(left: _LengthsLeft, capacity: int) -> Counter[int]:
    """Lengths for one pack, and how many of each; they are taken from ``left``."""
    filling: Counter[int] = Counter()
    room = capacity
    while room and (length := left.longest(room)):
        exact = None if length == room or not filling else left.pair(room)
        for chosen in exact or (length,):
            filling[chosen] += 1
            left.take(chosen, 1)
            room -= chosen
    return filling


def _bits(there: np.ndarray) -> int:
    """Bit i of the result is ``there[i]``, bool ``[n]``."""
    return int.from_bytes(np.packbits(there, bitorder="little").tobytes(), "little")
