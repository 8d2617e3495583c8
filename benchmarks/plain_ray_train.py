"""The peer of ``recovery_speed.py``: Ray Train with DeepSpeed as their documentation has it, and nothing of Baton.

python benchmarks/plain_ray_train.py MODEL_FOLDER STORAGE
"""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

EVERY = 10
CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3},
    "zero_force_ds_cpu_optimizer": False,
}


def train(arguments: dict[str, Any]) -> None:
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    context = ray.train.get_context()
    rank = context.get_world_rank()
    print(f"peer rank {rank} pid {os.getpid()}", flush=True)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else a compiler runs for a minute
    deepspeed.init_distributed(dist_backend="gloo")
    model = AutoModelForCausalLM.from_pretrained(arguments["model"], dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    step = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            engine.load_checkpoint(folder)
            step = engine.global_steps
    torch.manual_seed(rank)
    while True:
        ids = torch.randint(0, 64, (2, 128))
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        step += 1
        if rank == 0:
            print(f"peer step {step}", flush=True)
        if step % EVERY == 0:
            with tempfile.TemporaryDirectory() as folder:
                engine.save_checkpoint(folder)
                torch.distributed.barrier()
                ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))


def main() -> None:
    os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", DS_ACCELERATOR="cpu")
    ray.init(num_cpus=2, include_dashboard=False)
    TorchTrainer(
        train,
        train_loop_config={"model": sys.argv[1]},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(name="peer", storage_path=sys.argv[2], failure_config=FailureConfig(max_failures=100)),
    ).fit()


if __name__ == "__main__":
    main()
