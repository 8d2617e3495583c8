"""Real records through Baton and through a plain PyTorch loop on the same rows: do they learn the same?

Full-parameter from a base, then LoRA on the tuned model; held-out perplexities of both sides, the unigram perplexity as
the bar to beat, and sample outputs. By default the quickstart's records; GSM8K with 150 steps takes most of an
hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from data_shards.order.sampler import Sampler
from data_shards.pack import Pack
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from launch.config import Config, load_config
from launch.quickstart_inputs import make_inputs
from trainer.schedule import learning_rate

ROOT = Path(__file__).resolve().parent.parent
IGNORED = -100


def padded(packs: list[Pack]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every sequence a row of its own: ids [B, T], attention mask [B, T], shifted labels [B, T - 1]."""
    rows = []
    for pack in packs:
        bounds = np.cumsum([0, *pack.sequence_lengths])
        rows += [(pack.input_ids[a:b], pack.trained[a:b]) for a, b in pairwise(bounds)]
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, (ids, trained) in enumerate(rows):
        tokens = torch.from_numpy(ids.astype(np.int64))
        input_ids[i, : len(ids)] = tokens
        mask[i, : len(ids)] = 1
        labels[i, : len(ids)] = torch.where(torch.from_numpy(trained.astype(bool)), tokens, IGNORED)
    return input_ids, mask, labels[:, 1:]


def loss_sum(model: Any, packs: list[Pack]) -> tuple[torch.Tensor, int]:
    input_ids, mask, labels = padded(packs)
    logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    total = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, int((labels != IGNORED).sum())


@torch.no_grad()
def perplexity(model: Any, split: SplitReader) -> float:
    model.eval()
    total, count = 0.0, 0
    for row in range(split.num_rows):
        loss, tokens = loss_sum(model, [split.pack(row)])
        total, count = total + loss.item(), count + tokens
    return math.exp(total / count)


def unigram_perplexity(train: SplitReader, test: SplitReader, vocab_size: int) -> float:
    """Of the test's trained tokens under their smoothed frequencies in train."""

    def targets(split: SplitReader) -> Counter[int]:
        found: Counter[int] = Counter()
        for row in range(split.num_rows):
            _, _, labels = padded([split.pack(row)])
            found.update(labels[labels != IGNORED].tolist())
        return found

    seen, wanted = targets(train), targets(test)
    total = sum(seen.values()) + vocab_size
    loss = -sum(count * math.log((seen[token] + 1) / total) for token, count in wanted.items())
    return math.exp(loss / sum(wanted.values()))


def plain_loop(model: Any, config: Config, split: SplitReader) -> None:
    """The same rows, the same schedule, nothing of Baton's trainer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.optimizer.lr, betas=config.optimizer.betas, weight_decay=0.0)
    steps, batch = config.training.steps or 0, config.training.global_batch
    sampler = Sampler(split.num_rows, config.seed, batch, steps * batch)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optimizer, step, steps)
        loss, count = loss_sum(model, [split.pack(int(row)) for row in sampler.rows_of_step(step)])
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, config.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()


def baton(verb: str, config: Path, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "launch" / f"{verb}.py"), "--config", str(config), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def write_config(
    work: Path, name: str, base: str, data: dict[str, Any], steps: int, lr: float, training: dict[str, Any]
) -> Path:
    path = work / f"{name}.yaml"
    values = {
        "model": {"base": base, "precision": "fp32"},
        "data": data,
        "training": {"global_batch": 8, "micro_batch": 2, "steps": steps, "log_every": 10, **training},
        "optimizer": {"lr": lr, "warmup_steps": 10},
        "checkpoint": {"every_steps": 50},
        "run": {"storage": str(work / "runs")},
        "cluster": {"launcher": "processes", "num_workers": 2},
        "export": {"at_end": True, "merge_lora": training.get("method") == "lora"},
    }
    path.write_text(json.dumps(values))
    return path


def compare(name: str, config_path: Path, tuned: Any, reference: Any) -> None:
    config = load_config(str(config_path))
    dataset = next(iter(Storage.at(f"{config.run.storage}/datasets").list()))
    location = Storage.at(f"{config.run.storage}/datasets/{dataset}")
    manifest = read_dataset_manifest(location)
    train, test = SplitReader(location, manifest, "train"), SplitReader(location, manifest, "validation")
    before = perplexity(reference, test)
    started = time.perf_counter()
    plain_loop(reference, config, train)
    seconds = time.perf_counter() - started
    ours, theirs = perplexity(tuned, test), perplexity(reference, test)
    unigram = unigram_perplexity(train, test, reference.config.vocab_size)
    print(
        f"{name}: {config.training.steps} steps; test perplexity before {before:.3f}, Baton {ours:.4f}, plain PyTorch "
        f"{theirs:.4f} (ratio {ours / theirs:.5f}), unigram {unigram:.3f}; the plain loop took {seconds:.0f} s",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="model directory; default: the quickstart's")
    parser.add_argument("--train", help="jsonl of question/answer records")
    parser.add_argument("--test", help="jsonl held out")
    parser.add_argument("--work", type=Path, help="where to put everything; default: a new temporary folder")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lora-steps", type=int, default=30)
    return parser.parse_args()


def main() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    options = arguments()
    work = options.work or Path(tempfile.mkdtemp(prefix="baton-against-plain-"))
    work.mkdir(parents=True, exist_ok=True)
    make_inputs(work / "inputs", num_train=1000)
    base = options.base or str(work / "inputs" / "base")
    data = {
        "train": options.train or str(work / "inputs" / "train.jsonl"),
        "validation": options.test or str(work / "inputs" / "validation.jsonl"),
        "seq_len": options.seq_len,
    }

    def load(path: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    full = write_config(work, "full", base, data, options.steps, 1e-3, {})
    started = time.perf_counter()
    baton("finetune", full)
    print(f"Baton, full: {time.perf_counter() - started:.0f} s with 2 workers, preparing and exporting included")
    tuned = work / "runs" / "full" / "export" / f"step-{options.steps:08d}" / "model"
    compare("full", full, load(tuned), load(base))

    lora = write_config(work, "lora", str(tuned), data, options.lora_steps, 2e-3, {"method": "lora"})
    baton("finetune", lora)
    merged = work / "runs" / "lora" / "export" / f"step-{options.lora_steps:08d}" / "merged"
    torch.manual_seed(0)
    settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    compare("LoRA on the tuned model", lora, load(merged), get_peft_model(load(tuned), settings))
    print(baton("generate", lora, "--count", "10", "--max-new-tokens", "60"))


if __name__ == "__main__":
    main()
