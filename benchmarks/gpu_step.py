"""Speed and memory of Baton's own step on one device, for models of real size with random weights.

    python benchmarks/gpu_step.py --shape 8b --method lora
    python benchmarks/gpu_step.py --shape 7b --method full --deterministic compare
    python benchmarks/gpu_step.py --shape tiny --device cpu

Neither Ray nor a model hub nor a prepared dataset is needed. docs/gpu.md says what each figure means.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from cluster.local_processes import free_port
from data_shards.pack import Pack
from launch.architectures import PUBLISHED
from tests.support.tiny import MemoryPacks
from trainer.activation_memory import Device
from trainer.config import Attention, Method, ModelConfig, OptimizerConfig, Precision, TrainerConfig, TrainingConfig
from trainer.deepspeed_config import deepspeed_config
from trainer.deterministic import make_deterministic
from trainer.engine import ZeroEngine, build_optimizer
from trainer.memory_plan import GIB, Workload, memory_plan
from trainer.model import DTYPES, build_trained_model, model_config
from trainer.model_flops import StepSize, step_flops
from trainer.model_shape import model_shape
from trainer.process_group import start_process_group
from trainer.step import StepResult, train_step

SHAPES: dict[str, dict[str, Any]] = {
    "7b": {  # Llama 2: arXiv 2307.09288, and the hub's config.json
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
    "8b": PUBLISHED["meta-llama/Llama-3.1-8B"],
    "qwen7b": PUBLISHED["Qwen/Qwen2.5-7B"],
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    },
}
DATASHEET_FLOPS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12}
"""Dense bf16 of the SXM parts, by NVIDIA's datasheets"""
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}


class Deterministic(StrEnum):
    OFF = "off"
    ON = "on"
    COMPARE = "compare"


@dataclass(frozen=True)
class Measured:
    """Figures of one run; bytes, seconds, FLOP/s."""

    device: str
    precision: str
    parameters: int
    trained_parameters: int
    tokens_per_step: int
    step_seconds: list[float]
    losses: list[float]
    seconds_by_part: dict[str, float]
    flops_per_step: dict[str, int]
    matmul_flops: float
    peak_allocated_bytes: int | None
    """None on a CPU, where nobody counts"""
    peak_bytes: int
    """reserved by the allocator; on a CPU the process's largest resident set"""
    planned_bytes: int

    @property
    def seconds(self) -> float:
        return statistics.median(self.step_seconds)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.seconds

    @property
    def flops(self) -> float:
        return sum(self.flops_per_step.values()) / self.seconds


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--method", type=Method, choices=list(Method), default=Method.LORA)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    parser.add_argument("--seq-len", type=int, default=4096, help="tokens per pack")
    parser.add_argument("--sequences", type=int, default=4, help="sequences per pack, of equal length, all trained")
    parser.add_argument("--micro-batch", type=int, default=1, help="packs per forward")
    parser.add_argument("--grad-accum", type=int, default=4, help="micro batches per step")
    parser.add_argument("--steps", type=int, default=8, help="timed steps, after --warm-up")
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--attention", type=Attention, choices=list(Attention), default=Attention.PACKED)
    parser.add_argument("--no-checkpointing", action="store_true", help="keep activations instead of recomputing")
    parser.add_argument("--deterministic", type=Deterministic, choices=list(Deterministic), default=Deterministic.OFF)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def trainer_config(options: argparse.Namespace, folder: str) -> TrainerConfig:
    """bf16 on a GPU; fp32 on a CPU, many of which have no fast bf16."""
    return TrainerConfig(
        model=ModelConfig(
            base=folder,
            random_init=True,
            precision=Precision.BF16 if torch.cuda.is_available() else Precision.FP32,
            attention=options.attention,
            activation_checkpointing=not options.no_checkpointing,
        ),
        training=TrainingConfig(
            method=options.method,
            global_batch=options.micro_batch * options.grad_accum,
            micro_batch=options.micro_batch,
            steps=options.steps + options.warm_up,
            deterministic=options.deterministic == Deterministic.ON,
        ),
        optimizer=OptimizerConfig(lr=1e-5),
    )


def write_base(shape: str, folder: str) -> None:
    """A config.json, which is all that random weights need."""
    from transformers import AutoConfig

    fields = dict(SHAPES[shape])
    AutoConfig.for_model(fields.pop("model_type"), **fields).save_pretrained(folder)


def make_packs(num: int, seq_len: int, sequences: int, vocab_size: int) -> MemoryPacks:
    """Random ids, every token trained."""
    rng = np.random.default_rng(0)
    lengths = np.diff(np.linspace(0, seq_len, sequences + 1).astype(int)).astype(np.int32)
    ids = rng.integers(0, vocab_size, (num, seq_len)).astype(np.int32)
    return MemoryPacks([Pack(row, np.ones(seq_len, bool), lengths) for row in ids])


def matmul_flops(device: torch.device, dtype: torch.dtype, repeats: int = 10, warm_up: int = 3) -> float:
    """FLOP/s of a large square product of random matrices: what this very device gives now."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for repeat in range(warm_up + repeats):
        if repeat == warm_up:
            _wait(device)
            started = time.perf_counter()
        a @ b
    _wait(device)
    return 2 * side**3 * repeats / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_engine(config: TrainerConfig) -> ZeroEngine:
    zero = deepspeed_config(config.model.precision, config.optimizer.max_grad_norm, config.zero)
    folder = Path(config.model.base)
    model = build_trained_model(
        folder, config.model, config.training.method, config.training.lora, zero, seed=config.seed
    )
    return ZeroEngine(model, build_optimizer(model, config.optimizer), zero)


def run_steps(engine: ZeroEngine, config: TrainerConfig, packs: MemoryPacks) -> list[tuple[float, StepResult]]:
    """(wall seconds, result) of every step; a step ends with a reduction that waits for the device."""
    batch = config.training.global_batch
    done = []
    for step in range(config.training.steps or 0):
        started = time.perf_counter()
        result = train_step(
            engine,
            packs,
            np.arange(step * batch, (step + 1) * batch) % packs.num_rows,
            step=step,
            seed=config.seed,
            micro_batch_size=config.training.micro_batch,
            learning_rate=config.optimizer.lr,
        )
        done.append((time.perf_counter() - started, result))
    return done


def measure(options: argparse.Namespace) -> Measured:
    if options.deterministic == Deterministic.ON:
        make_deterministic()
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**rank, "MASTER_PORT": str(free_port())}.items():
        os.environ.setdefault(name, value)
    start_process_group()
    with tempfile.TemporaryDirectory() as folder:
        write_base(options.shape, folder)
        config = trainer_config(options, folder)
        engine = build_engine(config)
        hf_config = model_config(Path(folder), config.model)
    rate = matmul_flops(engine.device, DTYPES[config.model.precision])
    batch = config.training.global_batch
    packs = make_packs(batch, options.seq_len, options.sequences, hf_config.vocab_size)
    timed = run_steps(engine, config, packs)[options.warm_up :]
    shape = model_shape(hf_config, config.model.precision, config.training.method, config.training.lora)
    on_gpu = engine.device.type == "cuda"
    device = Device.GPU if on_gpu else Device.CPU
    workload = Workload.of(config, shape, world_size=1, seq_len=options.seq_len, evaluates=False, device=device)
    parts = {name: [result.seconds_by_part[name] for _, result in timed] for name in timed[0][1].seconds_by_part}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux gives KiB
    return Measured(
        device=torch.cuda.get_device_name() if on_gpu else "CPU",
        precision=config.model.precision.value,
        parameters=shape.num_parameters,
        trained_parameters=sum(p.numel for p in shape.trained),
        tokens_per_step=timed[0][1].tokens,
        step_seconds=[seconds for seconds, _ in timed],
        losses=[result.loss for _, result in timed],
        seconds_by_part={name: statistics.median(values) for name, values in parts.items()},
        flops_per_step=step_flops(shape, StepSize.of(packs.all))._asdict(),
        matmul_flops=rate,
        peak_allocated_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        peak_bytes=torch.cuda.max_memory_reserved() if on_gpu else resident,
        planned_bytes=memory_plan(workload).required_bytes,
    )


def report(options: argparse.Namespace, found: Measured) -> None:
    print(
        f"{options.shape}, {options.method.value}: {found.parameters:,} parameters, {found.trained_parameters:,} "
        f"trained; {found.precision}, attention {options.attention.value}, activations "
        f"{'kept' if options.no_checkpointing else 'recomputed'}, deterministic {options.deterministic.value}; "
        f"{options.grad_accum} micro batches of {options.micro_batch} packs of {options.seq_len} tokens a step, "
        f"{options.sequences} sequences a pack; on {found.device}, torch {torch.__version__}"
    )
    low, high = min(found.step_seconds), max(found.step_seconds)
    print(
        f"  speed       {found.tokens_per_second:,.0f} tokens/s; step {found.seconds:.3f} s, median of "
        f"{len(found.step_seconds)} ({low:.3f} to {high:.3f})"
    )
    print("  of a step   " + ", ".join(f"{name} {value:.3f} s" for name, value in found.seconds_by_part.items()))
    print(
        f"  compute     {found.flops / 1e12:.4g} TFLOP/s = {found.flops / found.matmul_flops:.1%} of the "
        f"{found.matmul_flops / 1e12:.4g} that a product of side {MATMUL_SIDE[_kind(found)]} gave in this very call"
    )
    if peak := next((rate for name, rate in DATASHEET_FLOPS.items() if name in found.device), None):
        print(f"  MFU         {found.flops / peak:.1%} of the datasheet's {peak / 1e12:.4g} TFLOP/s")
    what = "resident, the whole process" if found.peak_allocated_bytes is None else "reserved"
    allocated = f"{found.peak_allocated_bytes / GIB:.2f} GiB allocated, " if found.peak_allocated_bytes else ""
    print(
        f"  memory      {allocated}{found.peak_bytes / GIB:.2f} GiB {what}; planned "
        f"{found.planned_bytes / GIB:.2f} GiB (measured / planned {found.peak_bytes / found.planned_bytes:.2f})"
    )
    print(f"  loss        {found.losses[0]:.4f} to {found.losses[-1]:.4f}", flush=True)


def _kind(found: Measured) -> str:
    return "cpu" if found.device == "CPU" else "cuda"


def compare(options: argparse.Namespace) -> None:
    """Both settings, each in a process of its own, because cuBLAS and the allocator remember."""
    given = sys.argv[1:]
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for setting in (Deterministic.OFF, Deterministic.ON):
            path = Path(folder) / f"{setting.value}.json"
            own = ["--deterministic", setting.value, "--json", str(path)]  # the last one given counts
            subprocess.run([sys.executable, __file__, *given, *own], check=True)
            seconds[setting] = statistics.median(json.loads(path.read_text())["step_seconds"])
    slower = seconds[Deterministic.ON] / seconds[Deterministic.OFF]
    print(f"deterministic costs a factor of {slower:.3f} in time per step")
    if options.json:
        options.json.write_text(json.dumps({"deterministic_over_not": slower, "step_seconds": seconds}))


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", category=FutureWarning)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a device
    elif not torch.cuda.is_available() and (options.device == "cuda" or options.shape != "tiny"):
        sys.exit("no GPU here (torch.cuda.is_available() is false); --shape tiny --device cpu runs the same on a CPU")
    if options.deterministic == Deterministic.COMPARE:
        compare(options)
        return
    found = measure(options)
    report(options, found)
    if options.json:
        figures = {"tokens_per_second": found.tokens_per_second, "achieved_flops": found.flops}
        options.json.write_text(json.dumps(asdict(found) | figures))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
