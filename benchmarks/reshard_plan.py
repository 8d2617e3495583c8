"""What loading a checkpoint on another number of workers reads, worked out for a real model by the code that does it.

Every parameter of the model (on the meta device) is cut for each number of workers; the ranges that each rank would
read are planned as ``SliceReader`` plans them, with the rank files' real layout, headers included. Checked and printed:
every element is read exactly once, bytes for each rank beside its share, blocks that are read whole to be verified,
seconds of planning for each rank; and the requests and bytes that a save and a resume cost beside the elements.

    python benchmarks/reshard_plan.py --base meta-llama/Llama-3.1-70B --workers 64 48 8 1
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import AutoConfig

from data_shards.hashed_file import BLOCK_BYTES, DIGEST_BYTES, FileEntry
from launch.architectures import PUBLISHED
from tests.support.tiny import DRAFT
from trainer.checkpoint import hash_file, rank_file
from trainer.checkpoint_manifest import ParameterEntry
from trainer.config import LoraConfig, Method, Precision
from trainer.model_shape import model_shape
from trainer.rank_file import RANK_BLOCK_BYTES, RankFile
from trainer.slices import overlaps, slice_bounds
from trainer.tensor_files import TensorSpec, header_bytes

PARTS = ("fp32", "exp_avg", "exp_avg_sq")
FP32 = 4


class Reading(NamedTuple):
    """Of one rank."""

    wanted_bytes: int
    read_bytes: int
    """whole blocks"""
    seconds: float
    """of planning"""
    num_files: int


def layout(parameters: list[ParameterEntry], rank: int, world_size: int) -> dict[str, int]:
    """Where each tensor of a rank file begins."""
    import torch

    lengths = {}
    for parameter in parameters:
        start, stop = slice_bounds(parameter.numel, rank, world_size)
        if start < stop:
            lengths |= {f"{parameter.name}/{part}": stop - start for part in PARTS}
    specs = {name: TensorSpec((length,), torch.float32) for name, length in lengths.items()}
    offset, found = len(header_bytes(specs)), {}
    for name, spec in specs.items():
        found[name] = offset
        offset += spec.nbytes
    return found


def plan(
    parameters: list[ParameterEntry], layouts: list[dict[str, int]], rank: int, world_size: int, block_bytes: int
) -> Reading:
    """What one rank of ``world_size`` reads out of as many rank files as there are layouts.

    Raises AssertionError where an element that it holds is read more or less than once.
    """
    started = time.perf_counter()
    ranges: dict[int, list[tuple[int, int]]] = {}
    for parameter in parameters:
        start, stop = slice_bounds(parameter.numel, rank, world_size)
        reached = 0
        for found in overlaps(parameter.numel, len(layouts), start, stop):
            assert found.offset == reached, "a gap, or read twice"
            source_start = slice_bounds(parameter.numel, found.source_rank, len(layouts))[0]
            assert source_start + found.start == start + found.offset, "not these elements"
            reached += found.stop - found.start
            for part in PARTS:
                offset = layouts[found.source_rank][f"{parameter.name}/{part}"]
                span = offset + found.start * FP32, offset + found.stop * FP32
                ranges.setdefault(found.source_rank, []).append(span)
        assert reached == stop - start, "not all of them"
    seconds = time.perf_counter() - started
    wanted = sum(high - low for spans in ranges.values() for low, high in spans)
    blocks = sum(num_blocks(spans, block_bytes) for spans in ranges.values())
    return Reading(wanted, blocks * block_bytes, seconds, len(ranges))


def num_blocks(spans: list[tuple[int, int]], block_bytes: int) -> int:
    """Blocks that are touched by these bytes, each counted once."""
    total = reached = 0
    for low, high in sorted(spans):
        first, stop = max(low // block_bytes, reached), -(-high // block_bytes)
        total += max(0, stop - first)
        reached = max(reached, stop)
    return total


def reshard(parameters: list[ParameterEntry], source: int, target: int, block_bytes: int) -> list[Reading]:
    """Of every rank of ``target``; together their slices are the whole parameters, without overlap."""
    for parameter in parameters:
        bounds = [slice_bounds(parameter.numel, rank, target) for rank in range(target)]
        assert bounds[0][0] == 0 and bounds[-1][1] == parameter.numel
        assert all(one[1] == next_one[0] for one, next_one in pairwise(bounds))
    layouts = [layout(parameters, rank, source) for rank in range(source)]
    return [plan(parameters, layouts, rank, target, block_bytes) for rank in range(target)]


def overhead(parameters: list[ParameterEntry], world_size: int) -> str:
    """Of one save and one resume, beside the elements themselves."""
    state = sum(p.numel for p in parameters) * FP32 * len(PARTS)
    hash_bytes = state // world_size // RANK_BLOCK_BYTES * DIGEST_BYTES
    hashes = FileEntry(hash_file(0), hash_bytes, bytes(-(-hash_bytes // BLOCK_BYTES) * DIGEST_BYTES))
    manifest = replace(
        DRAFT,
        world_size=world_size,
        parameters=tuple(parameters),
        optimizer={"name": "adamw", "step": 1, "state_keys": list(PARTS[1:])},
        files=(RankFile(rank_file(0), state // world_size, RANK_BLOCK_BYTES, hashes),) * world_size,
    )
    return (
        f"{world_size:,} ranks: a manifest of {len(manifest.to_bytes()) / 1e3:,.0f} kB, {hash_bytes / 1e6:.1f} MB of "
        f"hashes a rank. A save writes {3 * world_size + 1:,} files; rank 0 lists receipts ({-(-world_size // 1000)} "
        f"requests each time) and reads {world_size:,}. To look at a checkpoint takes "
        f"{-(-(2 * world_size + 2) // 1000)} listing requests and 1 read"
    )


def told(source: int, target: int, block_bytes: int, share: float, found: list[Reading]) -> str:
    amplified = [each.read_bytes / each.wanted_bytes for each in found]
    return (
        f"{source:>3} -> {target:<3} blocks of {block_bytes // 1024:>5,} KiB: a rank needs "
        f"{min(each.wanted_bytes for each in found) / share:.4f} to "
        f"{max(each.wanted_bytes for each in found) / share:.4f} of an equal share, and reads "
        f"{sum(amplified) / len(amplified):.4f} times that, at most {max(amplified):.4f}, from up to "
        f"{max(each.num_files for each in found)} files; planned in {max(each.seconds for each in found):.2f} s at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(PUBLISHED), default="meta-llama/Llama-3.1-70B")
    parser.add_argument("--workers", type=int, nargs="+", default=[64, 48, 8, 1])
    parser.add_argument("--block-bytes", type=int, nargs="+", default=[RANK_BLOCK_BYTES, BLOCK_BYTES])
    options = parser.parse_args()
    hf_config = AutoConfig.for_model(**PUBLISHED[options.base])
    shape = model_shape(hf_config, Precision.BF16, Method.FULL, LoraConfig())
    parameters = [ParameterEntry(p.name, p.shape) for p in shape.trained]
    elements = sum(p.numel for p in parameters)
    state = elements * FP32 * len(PARTS)
    print(f"{options.base}: {len(parameters)} parameters, {elements:,} elements, {state / 1e9:,.1f} GB of state")
    for source, target in pairwise(options.workers):
        for block_bytes in options.block_bytes:
            found = reshard(parameters, source, target, block_bytes)
            assert sum(each.wanted_bytes for each in found) == state, "all, once"
            print(told(source, target, block_bytes, state / target, found), flush=True)
    for world_size in (64, 1024):
        print(overhead(parameters, world_size))


if __name__ == "__main__":
    main()
