"""Packing: seconds of one core and fullness, for each distribution of lengths and each way; beside TRL's best fit.

    .venv/bin/python benchmarks/packing_speed.py [--count 1000000] [--rounds 3]

TRL's packer moves the tokens along with the bookkeeping, so it gets one byte a token, and its time without the moving
is estimated by taking off what pyarrow needs to move as much. It gets 100,000 lengths, and so does Baton beside it.
TRL must be installed beside Baton (`pip install --no-deps trl`); without it only Baton's figures are printed.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_shards.writing.packing import Packing, best_fit, pack

CAPACITY = 2048


def distributions(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Lengths by name, int64 ``[count]`` each, at most CAPACITY."""
    rng = np.random.default_rng(seed)
    drawn = {
        "log-normal": rng.lognormal(5.3, 0.9, count),
        "zipf": 30.0 * rng.zipf(1.5, count) + rng.integers(0, 30, count),
        "short answers": rng.normal(230, 80, count),
        "uniform": rng.integers(1, CAPACITY + 1, count),
    }
    return {name: np.clip(lengths, 8, CAPACITY).astype(np.int64) for name, lengths in drawn.items()}


def timed(work: Callable[[], list[Any]]) -> tuple[float, int]:
    """CPU seconds, and the number of packs."""
    started = time.process_time()
    packs = work()
    return time.process_time() - started, len(packs)


def fullness(lengths: np.ndarray, num_packs: int) -> float:
    return float(lengths.sum() / num_packs / CAPACITY)


def report_ways(name: str, lengths: np.ndarray, rounds: int) -> None:
    ways: dict[str, Callable[[], list[Any]]] = {
        how.value: lambda how=how: pack(lengths, CAPACITY, how)  # type: ignore[misc]
        for how in Packing
    }
    for way, work in {"best_fit, indices only": lambda: best_fit(lengths, CAPACITY), **ways}.items():
        took, packs = zip(*(timed(work) for _ in range(rounds)), strict=True)
        full = fullness(lengths, packs[0])
        print(f"{name:14} {len(lengths):>9,} {way:22} {statistics.median(took):6.2f} s  {full:8.3%} full")


def report_peer(name: str, lengths: np.ndarray, rounds: int) -> None:
    from trl.data_utils import _pack_bfd

    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    table = pa.table({"input_ids": pa.ListArray.from_arrays(offsets, pa.array(np.zeros(lengths.sum(), np.int8)))})
    order = pa.array(np.random.default_rng(0).permutation(len(lengths)))
    sides: dict[str, Callable[[], Any]] = {
        "Baton": lambda: best_fit(lengths, CAPACITY),
        "TRL": lambda: _pack_bfd(table, CAPACITY),
        "moving": lambda: pc.take(table, order),
    }
    results: dict[str, list[tuple[float, int]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, work in sides.items():
            results[side].append(timed(work))
    took = {side: statistics.median(seconds for seconds, _ in result) for side, result in results.items()}
    full = {side: fullness(lengths, result[0][1]) for side, result in results.items()}
    took["TRL"] -= took["moving"]
    print(
        f"{name:14} {len(lengths):>9,} "
        + ", ".join(f"{side} {took[side]:.2f} s {full[side]:.3%}" for side in ("Baton", "TRL"))
        + f", ratio {took['TRL'] / took['Baton']:.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for name, lengths in distributions(args.count).items():
        report_ways(name, lengths, args.rounds)
        if importlib.util.find_spec("trl"):
            report_peer(name, lengths[:100_000], args.rounds)


if __name__ == "__main__":
    main()
