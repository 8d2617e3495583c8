"""How one step's rows are split over ranks and micro batches (pure)."""

from __future__ import annotations


def rank_micro_batches(num_rows: int, *, rank: int, world_size: int, micro_batch_size: int) -> list[tuple[int, int]]:
    """The positions, inside one step's rows, of each micro batch of ``rank``.

    Rows are dealt in contiguous parts whose sizes differ by at most one. Every rank gets the same number of micro
    batches, some perhaps empty, so that collectives stay aligned; nothing is dropped and nothing repeated.

    Returns:
        ``[(start, stop), ...]``, ``start == stop`` for an empty one; at least one entry.
    """
    if num_rows < 1 or micro_batch_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"bad geometry: {num_rows=} {rank=} {world_size=} {micro_batch_size=}")
    share, extra = divmod(num_rows, world_size)
    start = rank * share + min(rank, extra)
    stop = start + share + (1 if rank < extra else 0)
    largest_part = share + (1 if extra else 0)
    num_micro_batches = -(-largest_part // micro_batch_size)
    return [
        (min(start + i * micro_batch_size, stop), min(start + (i + 1) * micro_batch_size, stop))
        for i in range(num_micro_batches)
    ]
