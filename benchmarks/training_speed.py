"""Tokens per second of Baton's own step path, and where the time goes. One rank of it:

    torchrun --nproc-per-node 2 benchmarks/training_speed.py MODEL [--dataset PREPARED] [--train-on all|assistant]

Without a dataset: packs of one sequence of --seq-len random tokens, all trained. Prints one line of JSON on rank 0.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_shards.order.sampler import Sampler
from data_shards.pack import Pack
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from tests.support.tiny import MemoryPacks
from trainer.batch import MicroBatch
from trainer.config import Attention, LoraConfig, Method, ModelConfig, OptimizerConfig, Precision, Schedule, ZeroConfig
from trainer.deepspeed_config import deepspeed_config
from trainer.engine import ZeroEngine, build_optimizer
from trainer.model import build_trained_model
from trainer.process_group import start_process_group
from trainer.step import PackSource, train_step

WARM_UP_STEPS = 3


class TimedEngine(ZeroEngine):
    """Adds up wall seconds by part. Exact on CPU; on a GPU kernels run on behind the clock."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seconds: dict[str, float] = defaultdict(float)
        self._engine.backward = self._timed("backward and gradient reduction", self._engine.backward)
        self._engine.step = self._timed("optimizer", self._engine.step)

    def _timed(self, part: str, function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[part] += time.perf_counter() - started

        return run

    def train_micro_batch(self, batch: MicroBatch, global_trained_tokens: int, *, is_last: bool) -> torch.Tensor:
        before = self.seconds["backward and gradient reduction"]
        started = time.perf_counter()
        loss = super().train_micro_batch(batch, global_trained_tokens, is_last=is_last)
        backward = self.seconds["backward and gradient reduction"] - before
        self.seconds["forward and loss"] += time.perf_counter() - started - backward
        return loss


def random_packs(num: int, seq_len: int, vocab_size: int) -> MemoryPacks:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab_size, (num, seq_len)).astype(np.int32)
    return MemoryPacks([Pack(row, np.ones(seq_len, bool), np.full(1, seq_len, np.int32)) for row in ids])


def make_engine(model: str, attention: Attention, zero: ZeroConfig) -> TimedEngine:
    """fp32, AdamW, clipping to 1: what the peers do."""
    config = ModelConfig(base=model, precision=Precision.FP32, attention=attention)
    ds_config = deepspeed_config(Precision.FP32, 1.0, zero)
    built = build_trained_model(Path(model), config, Method.FULL, LoraConfig(), ds_config, seed=0)
    optimizer = build_optimizer(built, OptimizerConfig(lr=1e-3, schedule=Schedule.CONSTANT))
    return TimedEngine(built, optimizer, ds_config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dataset", help="folder of a prepared dataset")
    parser.add_argument("--attention", type=Attention, default=Attention.PACKED)
    parser.add_argument("--no-overlap", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start_process_group()
    engine = make_engine(options.model, options.attention, ZeroConfig(overlap_comm=not options.no_overlap))
    global_batch = options.micro_batch * engine.world_size
    source: PackSource
    if options.dataset:
        location = Storage.at(options.dataset)
        source = SplitReader(location, read_dataset_manifest(location), "train")
    else:
        source = random_packs(4 * global_batch, options.seq_len, engine.module.config.vocab_size)
    total = options.steps + WARM_UP_STEPS
    sampler = Sampler(source.num_rows, 0, global_batch, total * global_batch)
    tokens = trained = 0
    for step in range(total):
        if step == WARM_UP_STEPS:
            torch.distributed.barrier()
            engine.seconds.clear()
            tokens, trained, started = 0, 0, time.perf_counter()
        result = train_step(
            engine,
            source,
            sampler.rows_of_step(step),
            step=step,
            seed=0,
            micro_batch_size=options.micro_batch,
            learning_rate=1e-3,
        )
        tokens, trained = tokens + result.tokens, trained + result.trained_tokens
    torch.distributed.barrier()
    seconds = time.perf_counter() - started
    parts = {part: spent / seconds for part, spent in engine.seconds.items()}
    parts["data, reseeding, agreement"] = 1 - sum(parts.values())
    if engine.rank == 0:
        shares = {part: round(share, 3) for part, share in parts.items()}
        print(
            json.dumps({"tokens_per_s": tokens / seconds, "trained_share": trained / tokens, "parts": shares}),
            flush=True,
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # gloo's threads would else now and then abort at exit


if __name__ == "__main__":
    main()
