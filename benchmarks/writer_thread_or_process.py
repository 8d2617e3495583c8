"""What writing a checkpoint costs the steps that go on: in a thread of the worker, or in a process of its own.

A small model trains in plain PyTorch, on one thread, many short operators a step: what waits for Python's lock waits
often. Meanwhile a rank's slices in shared memory are written, hashed and synced again and again by ``write_rank`` at
niceness 10: in a thread, as Baton does, or in a process that was forked before. Turns of steps alone, beside the thread
and beside the process follow one another; medians of their steps are compared within each round.

    python benchmarks/writer_thread_or_process.py --megabytes 512 --rounds 5 --folder DIR
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_shards.storage import Storage
from trainer import checkpoint

NICENESS = 10
TENSORS = 32


def write_until(slices: dict[str, torch.Tensor], folder: Path, stop: Any, written: Any) -> None:
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    number = 0
    while not stop.is_set():
        number += 1
        checkpoint.write_rank(Storage.at(folder / str(number % 2)), 0, slices)
        written.value += 1


def make_step(device_threads: int) -> Callable[[], None]:
    torch.set_num_threads(device_threads)
    torch.manual_seed(0)
    blocks = [torch.nn.TransformerEncoderLayer(128, 4, 512, 0.0, batch_first=True) for _ in range(4)]
    model = torch.nn.Sequential(*blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
    batch = torch.randn(2, 64, 128)

    def step() -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    return step


def median_step(step: Callable[[], None], seconds: float) -> float:
    times, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def beside(kind: str, step: Callable[[], None], slices: dict[str, torch.Tensor], folder: Path, seconds: float) -> float:
    """The median step while a writer of this kind is at work. Prints how much it wrote."""
    maker: Any = threading if kind == "thread" else multiprocessing.get_context("fork")
    stop, written = maker.Event(), multiprocessing.Value("i", 0)
    start = threading.Thread if kind == "thread" else maker.Process
    writer = start(target=write_until, args=(slices, folder, stop, written))
    writer.start()
    time.sleep(0.5)
    before, started = written.value, time.perf_counter()
    median = median_step(step, seconds)
    megabytes = sum(value.nbytes for value in slices.values()) / 1e6
    print(f"  {kind}: {(written.value - before) * megabytes / (time.perf_counter() - started):,.0f} MB/s written")
    stop.set()
    writer.join()
    return median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn")
    parser.add_argument("--folder", type=Path, help="on the disk to write to; default: a temporary one")
    options = parser.parse_args()
    numel = options.megabytes * 1_000_000 // 4 // TENSORS
    slices = {f"p{index}/fp32": torch.rand(numel).share_memory_() for index in range(TENSORS)}
    step = make_step(1)
    median_step(step, 2.0)
    ratios: dict[str, list[float]] = {"thread": [], "process": []}
    with tempfile.TemporaryDirectory(dir=options.folder) as temp:
        for number in range(options.rounds):
            alone = [median_step(step, options.seconds / 2)]
            found = {kind: beside(kind, step, slices, Path(temp), options.seconds) for kind in ratios}
            alone.append(median_step(step, options.seconds / 2))
            base = statistics.mean(alone)
            for kind, median in found.items():
                ratios[kind].append(median / base)
            each = "  ".join(f"{kind} {ratios[kind][-1]:.3f}" for kind in ratios)
            print(f"round {number + 1}: alone {base * 1e3:.1f} ms; beside a writer, of that: {each}", flush=True)
    for kind, all_of_them in ratios.items():
        print(f"{kind}: a step takes {statistics.median(all_of_them):.3f} of one alone")


if __name__ == "__main__":
    main()
