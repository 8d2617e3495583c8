"""Is the run's storage the same one for all workers? Told at the start, before any work could be lost."""

from __future__ import annotations

import time

import torch

from data_shards.errors import BadInput
from data_shards.storage import Storage

_PATIENCE_S, _PAUSE_S = 10.0, 0.5
"""A file system over the network may show another node's file a few seconds late."""


def check_shared(attempt: Storage, rank: int, world_size: int, patience_s: float = _PATIENCE_S) -> None:
    """Each rank leaves a mark and looks for that of the next one; where nodes have folders of their own under one path,
    the ring has gaps. Collective.

    Raises BadInput on all ranks where a mark is not seen.
    """
    attempt.write(_mark(rank), [b""])
    torch.distributed.barrier()
    neighbour = (rank + 1) % world_size
    gaps = torch.zeros(world_size)
    gaps[neighbour] = not _appears(attempt, _mark(neighbour), patience_s)
    if torch.cuda.is_available():
        gaps = gaps.cuda()
    torch.distributed.all_reduce(gaps)
    unseen = [index for index, gap in enumerate(gaps.tolist()) if gap]
    if unseen:
        ranks = ", ".join(map(str, unseen[:8]))
        raise BadInput(
            f"{attempt.uri}: what rank {ranks} of {world_size} wrote there is not seen by its neighbour, so the nodes "
            "do not share this storage, and checkpoints would be in pieces. Set run.storage to a file system that all "
            "nodes mount, or to s3://… or gs://…; nodes' own disks can hold checkpoint.fast"
        )


def _mark(rank: int) -> str:
    return f"marks/rank-{rank:05d}"


def _appears(attempt: Storage, name: str, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not attempt.exists(name):
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE_S)
    return True
