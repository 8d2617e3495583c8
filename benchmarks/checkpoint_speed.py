"""What a checkpoint costs: the wait of a step, writing, loading; beside memcpy, dd, DeepSpeed's own and torch's DCP.

Workers (gloo, CPU) hold a random Llama-shaped model of about the given size of state (fp32 master and two Adam states,
12 bytes a parameter, over all ranks). Each round measures, as the slowest rank sees it:

- stall: what training waits for a save (``Saver.begin``, and the next update for the copies that are made behind
  forward and backward), beside one plain copy of as many bytes to memory that was touched; and what that step takes
  longer than others, for what copies beside it takes of processors and memory
- persist: a save at rest, copies, hashes and fsync included, beside ``dd conv=fsync`` of as many bytes by each rank
- load: a committed checkpoint into the engine's own memory, every block hashed, beside ``dd`` reading the same files
- ``engine.save_checkpoint`` and ``load_checkpoint``; DCP's ``save``, and the wait of its ``async_save``
- steps while a save is written (but for the first, see stall), beside steps without one; CPU seconds of the writing
  thread

Whatever is read was dropped from the page cache before, for all contenders alike. ``--reshard`` instead saves on 4
workers and loads on 2, and saves on 2 and loads on 3, each beside a load of what as many workers have saved; from the
disk, whose speed changes from one time to the next, and from the page cache, which shows what the work itself takes.

    python benchmarks/checkpoint_speed.py --gigabytes 2 --workers 2 --rounds 5 --folder DIR
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_shards.pack import Pack
from data_shards.storage import Storage
from tests.support.checkpoints import committed
from tests.support.distributed import run_workers
from tests.support.tiny import DRAFT, VOCAB, MemoryPacks, ragged_packs
from trainer import checkpoint
from trainer.checkpoint_manifest import Progress
from trainer.config import STATE_KEYS, LoraConfig, Method, ModelConfig, OptimizerConfig, Precision, ZeroConfig
from trainer.deepspeed_config import deepspeed_config
from trainer.engine import ZeroEngine, build_optimizer
from trainer.model import build_trained_model
from trainer.saving import Saver
from trainer.step import Standing, train_step

BYTES_PER_PARAMETER = 12
HIDDEN, FFN = 2048, 8192
OPTIMIZER = OptimizerConfig(lr=1e-4)

Times = dict[str, float]


def write_base(folder: Path, gigabytes: float) -> None:
    """A config of as many layers as make about this size of state."""
    per_layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN
    layers = max(1, round(gigabytes * 1e9 / BYTES_PER_PARAMETER / per_layer))
    shape = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": 16}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, **shape}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))


def make_engine(base: str) -> ZeroEngine:
    """After a first step, so that the optimizer has its states."""
    zero = deepspeed_config(Precision.FP32, OPTIMIZER.max_grad_norm, ZeroConfig())
    config = ModelConfig(base=base, random_init=True, precision=Precision.FP32)
    model = build_trained_model(Path(base), config, Method.FULL, LoraConfig(), zero, seed=0)
    engine = ZeroEngine(model, build_optimizer(model, OPTIMIZER), zero)
    packs = ragged_packs(engine.world_size)
    rows = torch.arange(engine.world_size).numpy()
    train_step(engine, packs, rows, step=0, seed=0, micro_batch_size=1, learning_rate=OPTIMIZER.lr)
    return engine


def slowest(action: Callable[[], Any]) -> float:
    """Seconds until the last rank is done with it."""
    torch.distributed.barrier()
    started = time.perf_counter()
    action()
    seconds = torch.tensor(time.perf_counter() - started)
    torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX)
    return float(seconds)


def dd(*arguments: str) -> None:
    subprocess.run(["dd", "bs=8M", *arguments], check=True, capture_output=True)


def plain_copy(num_bytes: int) -> float:
    """Seconds of one copy to memory that was touched."""
    source, target = torch.rand(num_bytes // 4), torch.zeros(num_bytes // 4)
    target.copy_(source)
    return slowest(lambda: target.copy_(source))


def forget(folder: Path) -> None:
    """Drop all files from the page cache; they were synced. Collective."""
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        for path in (path for path in folder.rglob("*") if path.is_file()):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    torch.distributed.barrier()


def one_round(engine: ZeroEngine, saver: Saver, packs: MemoryPacks, root: Path, number: int) -> Times:
    import torch.distributed.checkpoint as dcp

    rank, storage = engine.rank, Storage.at(root / "baton")
    draft = replace(DRAFT, progress=Progress(step=number + 1))
    slices = dict(engine.local_slices())
    mine = sum(value.nbytes for value in slices.values())
    blocks = -(-mine // (8 << 20))
    times: Times = {"memcpy": plain_copy(mine)}
    cpu = time.process_time()
    times["persist"] = slowest(lambda: (saver.begin(draft), saver.finish()))
    times["CPU of writing"] = time.process_time() - cpu
    plain = root / f"plain-{rank}"
    times["dd write"] = slowest(lambda: dd("if=/dev/zero", f"of={plain}", f"count={blocks}", "conv=fsync"))
    ref = committed(storage)[-1]
    file = root / "baton" / ref.name / checkpoint.rank_file(rank)
    forget(root / "baton")
    times["dd read"] = slowest(lambda: dd(f"if={file}", "of=/dev/null"))
    forget(root / "baton")
    times["load"] = slowest(lambda: checkpoint.load(engine, storage, ref))
    deepspeed = engine._engine
    times["deepspeed save"] = slowest(lambda: deepspeed.save_checkpoint(str(root / "deepspeed"), tag="t"))
    forget(root / "deepspeed")
    times["deepspeed load"] = slowest(lambda: deepspeed.load_checkpoint(str(root / "deepspeed"), tag="t"))
    named = {f"{rank}/{name}": value for name, value in slices.items()}
    times["DCP save"] = slowest(lambda: dcp.save(named, checkpoint_id=str(root / "dcp")))
    pending: list[Any] = []
    times["DCP async stall"] = slowest(
        lambda: pending.append(dcp.async_save(named, checkpoint_id=str(root / "dcp-async")))
    )
    pending[0].result()
    torch.distributed.barrier()
    times |= steps_beside_a_save(engine, saver, packs, number)
    if rank == 0:
        for name in ("baton", "deepspeed", "dcp", "dcp-async"):
            shutil.rmtree(root / name, ignore_errors=True)
    plain.unlink()
    torch.distributed.barrier()
    return times | {"bytes": float(mine * engine.world_size)}


def steps_beside_a_save(engine: ZeroEngine, saver: Saver, packs: MemoryPacks, number: int) -> Times:
    """Of the slowest rank: seconds that training waits for a save; of its first step beyond the median of others; and
    the medians of steps without a save and while one is being written (by any rank)."""
    rows = torch.arange(engine.world_size).numpy()
    numbers = itertools.count(1000 * (number + 1))

    def step() -> bool:
        standing = Standing(saving=saver.busy)
        done = train_step(engine, packs, rows, step=1, seed=0, micro_batch_size=1, learning_rate=0.0, standing=standing)
        return done.standing.saving

    def begin_and_step() -> None:
        saver.begin(replace(DRAFT, progress=Progress(step=next(numbers))))
        step()

    slowest(step)
    alone, first, stalls, beside = [], [], [], []
    for _ in range(3):
        alone += [slowest(step)]
        first.append(slowest(begin_and_step))
        stall = torch.tensor(saver.stall_seconds)
        torch.distributed.all_reduce(stall, torch.distributed.ReduceOp.MAX)
        stalls.append(float(stall))
        saving = True
        while saving:
            started = time.perf_counter()
            saving = step()
            beside.append(time.perf_counter() - started)
        saver.finish()
    times = {"stall": statistics.median(stalls), "step": statistics.median(alone)}
    return times | {
        "first step's delay": statistics.median(first) - times["step"],
        "step beside a save": statistics.median(beside),
    }


def saved_and_loaded(base: str, root: str, load_from: str | None, save_to: str) -> Times:
    """Seconds to load what another number of workers has saved, and what this one has."""
    engine = make_engine(base)
    saver = Saver(engine, Storage.at(f"{root}/{save_to}"), commit_timeout_s=600)
    times: Times = {}
    saver.begin(replace(DRAFT, progress=Progress(step=1)))
    assert saver.finish().error is None

    def load(name: str, *, cached: bool) -> float:
        storage = Storage.at(f"{root}/{name}")
        ref = committed(storage)[-1]
        if not cached:
            forget(Path(root) / name)
        return slowest(lambda: checkpoint.load(engine, storage, ref))

    load(save_to, cached=False)  # the engine's states are allocated anew at each load: once before it counts
    if load_from is not None:
        for number in range(5):
            for cached in (False, True):
                for which, name in (("same", save_to), ("other", load_from)):
                    times[f"{which} {cached} {number}"] = load(name, cached=cached)
    return times


def reshard(base: str, root: str) -> None:
    before: str | None = None
    for workers, load_from in ((4, None), (2, "4"), (3, "2")):
        found = run_workers(saved_and_loaded, workers, base, root, load_from, str(workers), timeout_s=3600)[0]
        for cached in (False, True) if load_from is not None else ():
            same, other = (
                statistics.median(value for name, value in found.items() if name.startswith(f"{which} {cached}"))
                for which in ("same", "other")
            )
            print(
                f"{load_from} -> {workers}: {other:.2f} s, {workers} -> {workers}: {same:.2f} s, "
                f"{other / same:.2f} times as long, from the {'page cache' if cached else 'disk'}",
                flush=True,
            )
        if before is not None:
            shutil.rmtree(Path(root) / before)
        before = load_from


def packs_of(num: int, num_tokens: int) -> MemoryPacks:
    ids = np.arange(num_tokens, dtype=np.int32) % VOCAB
    pack = Pack(ids, np.ones(num_tokens, dtype=bool), np.array([num_tokens], dtype=np.int32))
    return MemoryPacks([pack] * num)


def worker(base: str, root: str, rounds: int, num_tokens: int) -> list[Times]:
    engine = make_engine(base)
    packs = packs_of(engine.world_size, num_tokens)
    saver = Saver(engine, Storage.at(f"{root}/baton"), commit_timeout_s=600)
    saver.staging.reserve(engine.num_local_elements * (1 + len(STATE_KEYS[OPTIMIZER.name])))
    found = []
    for number in range(rounds):
        found.append(one_round(engine, saver, packs, Path(root), number))
        if engine.rank == 0:
            shown = ", ".join(f"{name} {value:.2f}" for name, value in found[-1].items() if name != "bytes")
            print(f"round {number + 1}: {shown} s", flush=True)
    return found


RATIOS = (
    ("stall", "memcpy", "training waits for a save {:.2f} of a plain copy"),
    ("first step's delay", "memcpy", "its first step takes {:.2f} of a plain copy longer"),
    ("deepspeed save", "stall", "engine.save_checkpoint makes training wait {:.1f} times as long"),
    ("DCP async stall", "stall", "DCP's async_save makes training wait {:.1f} times as long"),
    ("dd write", "persist", "written at {:.2f} of dd's speed"),
    ("dd read", "load", "loaded at {:.2f} of dd's speed"),
    ("deepspeed load", "load", "loaded {:.2f} times as fast as load_checkpoint"),
    ("DCP save", "persist", "written {:.2f} times as fast as DCP"),
    ("step beside a save", "step", "a step takes {:.2f} times as long while a save is written"),
)


def report(found: list[Times]) -> None:
    by_name: dict[str, list[float]] = defaultdict(list)
    for times in found:
        for name, value in times.items():
            by_name[name].append(value)
    size = by_name.pop("bytes")[0]
    print(f"\n{size / 1e9:.2f} GB of state; medians of {len(found)} rounds")
    for name, values in by_name.items():
        print(f"  {name:16} {statistics.median(values):7.3f} s  {size / statistics.median(values) / 1e9:6.2f} GB/s")
    for above, below, text in RATIOS:
        ratio = statistics.median(a / b for a, b in zip(by_name[above], by_name[below], strict=True))
        print(text.format(ratio))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16, help="of a step, on each worker")
    parser.add_argument("--reshard", action="store_true")
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temp:
        write_base(Path(temp) / "base", options.gigabytes)
        if options.reshard:
            reshard(f"{temp}/base", f"{temp}/checkpoints")
            return
        found = run_workers(
            worker,
            options.workers,
            *(f"{temp}/base", f"{temp}/checkpoints", options.rounds, options.tokens),
            timeout_s=3600,
        )
    report(found[0])


if __name__ == "__main__":
    main()
