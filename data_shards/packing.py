"""Which sequences share a pack (pure)."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack by best fit, longest first (Ding et al., arXiv 2404.10830): nothing is cut, little room is left.

    Args:
        lengths: int ``[n]``, each in [1, capacity].

    Returns:
        Packs as lists of indices into ``lengths``; together they hold each index once. Ties go by index, so the result
        is a function of ``lengths`` alone.
    """
    lengths = np.asarray(lengths)
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths span {lengths.min()}-{lengths.max()}, a pack holds {capacity}")
    packs: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of by_room, sorted: at most ``capacity`` of them
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            pack = by_room[room].pop()
            if not by_room[room]:
                del by_room[room]
                rooms.pop(place)
        else:
            room, pack = capacity, len(packs)
            packs.append([])
        packs[pack].append(index)
        if left := room - length:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(pack)
    return packs
