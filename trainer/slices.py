"""Interval arithmetic of ZeRO-3 slices (pure).

On rank r of W, ZeRO-3 holds elements ``[r*c, min((r+1)*c, n))`` of every parameter of n elements, ``c = ceil(n / W)``
(deepspeed/runtime/zero/partition_parameters.py, ``partition_numel``).
"""

from __future__ import annotations

from typing import NamedTuple


class Overlap(NamedTuple):
    """Elements ``[start, stop)`` of ``source_rank``'s slice; they land at ``offset`` of the wanted slice."""

    source_rank: int
    start: int
    stop: int
    offset: int


def slice_bounds(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """``[start, stop)`` of the flattened parameter that ``rank`` holds; empty where the parameter is too small."""
    chunk = -(-numel // world_size)
    return min(rank * chunk, numel), min((rank + 1) * chunk, numel)


def overlaps(numel: int, source_world_size: int, start: int, stop: int) -> list[Overlap]:
    """Where elements ``[start, stop)`` of a parameter lie among the slices of ``source_world_size`` ranks."""
    chunk = -(-numel // source_world_size)
    found: list[Overlap] = []
    while start < stop:
        source_rank = start // chunk
        low, high = slice_bounds(numel, source_rank, source_world_size)
        taken = min(stop, high)
        offset = found[-1].offset + found[-1].stop - found[-1].start if found else 0
        found.append(Overlap(source_rank, start - low, taken - low, offset))
        start = taken
    return found
