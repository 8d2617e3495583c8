"""Loading a base model into ZeRO-3 slices: each rank reading its own, beside transformers' loader.

Workers (gloo, CPU; fresh processes for every load) build a random Llama of about the given size, whose files hold bf16.
Each round does both, in alternating order, into a model of the given precision, and shows what the slowest rank sees:

- seconds, from the config to a module that has its weights
- the most memory that a rank took beyond what it had before, pages of mapped files included
- bytes that each rank asked the files for; transformers maps them, which can't be counted: rank 0 reads all of them

Files that were just written are in the page cache, for both alike.

    python benchmarks/base_load_speed.py --gigabytes 1.5 --workers 2 --rounds 3 --folder DIR
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_shards.storage import Storage
from tests.support.distributed import run_workers
from trainer.base_loader import load_base, load_by_transformers, shapes_of, skeleton
from trainer.config import ModelConfig, Precision, ZeroConfig
from trainer.deepspeed_config import deepspeed_config
from trainer.export import write_model_files
from trainer.model import DTYPES, model_config
from trainer.tensor_files import TensorSpec

HIDDEN, FFN, VOCAB = 2048, 8192, 32_000
FILE_DTYPE = torch.bfloat16
MAX_FILE_BYTES = 500_000_000
SLICES, TRANSFORMERS = "by slices", "transformers"


class Load(NamedTuple):
    seconds: float
    peak_bytes: int
    read_bytes: int


def write_base(folder: Path, gigabytes: float) -> int:
    """Files of about this size in all, and the config that belongs to them. Returns the bytes of the tensors."""
    per_layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN
    layers = max(1, round((gigabytes * 1e9 / FILE_DTYPE.itemsize - 2 * VOCAB * HIDDEN) / per_layer))
    shape = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": layers, "num_attention_heads": 16}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, **shape}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = shapes_of(skeleton(model_config(folder, ModelConfig(base=str(folder)))))
    specs = {name: TensorSpec(shape, FILE_DTYPE) for name, shape in shapes.items()}
    storage = Storage.at(folder)
    write_model_files(storage, specs, lambda name: torch.randn(specs[name].shape).to(FILE_DTYPE), MAX_FILE_BYTES)
    return sum(spec.nbytes for spec in specs.values())


def worker(base: str, precision: Precision, loader: str) -> Load:
    read: list[int] = []
    preadv = os.preadv

    def counting(*arguments: Any) -> int:
        read.append(preadv(*arguments))
        return read[-1]

    os.preadv = counting
    zero = deepspeed_config(precision, 0.0, ZeroConfig())
    config = model_config(Path(base), ModelConfig(base=base, precision=precision))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.distributed.barrier()
    started = time.perf_counter()
    if loader == SLICES:
        load_base(Path(base), config, DTYPES[precision], zero, trust_remote_code=False, say=lambda line: None)
    else:
        load_by_transformers(Path(base), config, DTYPES[precision], zero, trust_remote_code=False)
    seconds = time.perf_counter() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return Load(seconds, peak, sum(read))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", type=Precision, default=Precision.BF16, choices=list(Precision))
    parser.add_argument("--folder", type=Path, help="on the disk to be measured; default a temporary one")
    options = parser.parse_args()
    rounds: list[dict[str, Load]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as temp:
        size = write_base(Path(temp) / "base", options.gigabytes)
        print(f"{size / 1e9:.2f} GB of tensors, {options.workers} workers, model in {options.precision.value}")
        for number in range(options.rounds):
            order = (SLICES, TRANSFORMERS) if number % 2 == 0 else (TRANSFORMERS, SLICES)
            loads = {}
            for loader in order:
                ranks = run_workers(worker, options.workers, f"{temp}/base", options.precision, loader, timeout_s=3600)
                loads[loader] = Load(*(max(values) for values in zip(*ranks, strict=True)))
            rounds.append(loads)
            for loader in (SLICES, TRANSFORMERS):
                load = loads[loader]
                read = load.read_bytes if loader == SLICES else size
                print(
                    f"round {number + 1}  {loader:12} {load.seconds:7.2f} s  {load.peak_bytes / 1e9:6.2f} GB at most  "
                    f"{read / 1e9:6.3f} GB read by a rank",
                    flush=True,
                )
    times = statistics.median(each[TRANSFORMERS].seconds / each[SLICES].seconds for each in rounds)
    memory = statistics.median(each[TRANSFORMERS].peak_bytes / each[SLICES].peak_bytes for each in rounds)
    print(f"\nby slices {times:.2f} times as fast, in {1 / memory:.2f} of the memory")


if __name__ == "__main__":
    main()
