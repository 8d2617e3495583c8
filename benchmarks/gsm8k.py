"""GSM8K through Baton and through a plain PyTorch loop on the same rows: do they learn the same?

Full-parameter from a random base, then LoRA on the tuned model; test perplexities of both sides, the unigram perplexity
as the bar to beat, and ten sample outputs. Takes about half an hour on 2 cores.

usage: gsm8k.py BASE_MODEL_DIR GSM8K_DIR [WORK_DIR] [STEPS] [LORA_STEPS]
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_shards.pack import Pack
from data_shards.sampler import Sampler
from data_shards.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from launch.config import Config, load_config
from trainer.schedule import learning_rate

IGNORED = -100


def padded(packs: list[Pack]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every sequence a row of its own: ids [B, T], attention mask [B, T], shifted labels [B, T - 1]."""
    rows = []
    for pack in packs:
        bounds = np.cumsum([0, *pack.sequence_lengths])
        rows += [(pack.input_ids[a:b], pack.trained[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
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


def write_config(work: Path, name: str, base: str, data: Path, steps: int, lr: float, training: dict[str, Any]) -> Path:
    path = work / f"{name}.yaml"
    values = {
        "model": {"base": base, "precision": "fp32"},
        "data": {"train": str(data / "train.jsonl"), "validation": str(data / "test.jsonl"), "seq_len": 512},
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


def main() -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base, data = sys.argv[1], Path(sys.argv[2])
    work = Path(sys.argv[3]) if len(sys.argv) > 3 else Path(tempfile.mkdtemp(prefix="baton-gsm8k-"))
    steps = int(sys.argv[4]) if len(sys.argv) > 4 else 150
    lora_steps = int(sys.argv[5]) if len(sys.argv) > 5 else 60
    work.mkdir(parents=True, exist_ok=True)

    def load(path: str | Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

    full = write_config(work, "full", base, data, steps, 1e-3, {})
    started = time.perf_counter()
    baton("finetune", full)
    print(f"Baton, full: {time.perf_counter() - started:.0f} s with 2 workers, preparing and exporting included")
    tuned = work / "runs" / "full" / "export" / f"step-{steps:08d}" / "model"
    compare("full", full, load(tuned), load(base))

    lora = write_config(work, "lora", str(tuned), data, lora_steps, 2e-3, {"method": "lora"})
    baton("finetune", lora)
    merged = work / "runs" / "lora" / "export" / f"step-{lora_steps:08d}" / "merged"
    torch.manual_seed(0)
    settings = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    compare("LoRA on the tuned model", lora, load(merged), get_peft_model(load(tuned), settings))
    print(baton("generate", lora, "--count", "10", "--max-new-tokens", "60"))


if __name__ == "__main__":
    main()
