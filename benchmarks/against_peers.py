"""Baton's training speed beside other ZeRO-3 loops, on the same model, both in one go, alternating.

Contenders, two workers each, fp32, AdamW, clipping, micro batch 4 packs of 512 tokens:

- rows of one sequence of random tokens, all trained: Baton and a bare DeepSpeed loop, with and without overlapping
  communication. The work is the same to the token.
- real records packed to 512 tokens: Baton with all tokens trained and TRL's SFTTrainer (which computes all logits
  whatever the mask). Both pack by best fit and keep packed sequences apart.
- the same packs with the records' real masks: Baton computes logits only where a token is trained.

Rows and packs are two comparisons (--only); the contenders take turns, in one order and the other, because a shared
machine's speed drifts by the minute.

The peers' scripts are not part of Baton: --peers names the folder that holds bare_deepspeed.py, peer_trl.py and
make_tiny.py. TRL must be installed beside Baton (`pip install --no-deps trl`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]

ROWS = ("Baton, full rows", "bare DeepSpeed", "bare DeepSpeed, overlap")


class Contender(NamedTuple):
    command: list[str]
    parse: Callable[[str], float]
    """tokens per second in its output"""


def number(pattern: str) -> Callable[[str], float]:
    return lambda output: float(re.search(pattern, output)[1])  # type: ignore[index]


def run(command: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
    return done.stdout


def prepare(folder: Path, model: str, data: str, train_on: str) -> str:
    """The folder of the records packed to 512 tokens."""
    config = {
        "model": {"base": model},
        "data": {"train": data, "seq_len": 512, "train_on": train_on, "prepared": str(folder / train_on)},
        "training": {"steps": 1},
        "run": {"storage": str(folder / "runs")},
    }
    path = folder / f"{train_on}.yaml"
    path.write_text(yaml.safe_dump(config))
    run([sys.executable, str(ROOT / "launch" / "prepare.py"), "--config", str(path)])
    (dataset,) = (entry.parent for entry in (folder / train_on).glob("*/manifest.json"))
    return str(dataset)


def contenders(options: argparse.Namespace, model: str, folder: Path) -> dict[str, Contender]:
    steps = str(options.steps)
    speed = number(r'"tokens_per_s": ([\d.]+)')
    ours = [*TORCHRUN, str(ROOT / "benchmarks" / "training_speed.py"), model, "--steps", steps]
    bare = [*TORCHRUN, str(options.peers / "bare_deepspeed.py"), model, steps]
    trl = [*TORCHRUN, str(options.peers / "peer_trl.py"), model, str(options.data), steps, "packing"]
    everything = prepare(folder, model, str(options.data), "all")
    masked = prepare(folder, model, str(options.data), "assistant")
    return {
        ROWS[0]: Contender(ours, speed),
        ROWS[1]: Contender([*bare, "0"], number(r": (\d+) tok/s")),
        ROWS[2]: Contender([*bare, "1"], number(r": (\d+) tok/s")),
        "Baton, packs, all trained": Contender([*ours, "--dataset", everything], speed),
        "TRL SFTTrainer, packing": Contender(trl, number(r": (\d+) real tok/s")),
        "Baton, packs, real masks": Contender([*ours, "--dataset", masked], speed),
    }


def parts(output: str) -> str:
    found = re.search(r'(\{"tokens_per_s".*\})', output)
    if not found:
        return ""
    value = json.loads(found[1])
    shares = ", ".join(f"{part} {share:.0%}" for part, share in value["parts"].items())
    return f"  trained {value['trained_share']:.0%}; {shares}"


def main() -> None:
    shared = os.environ.get("BATON_SHARED")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, default=Path(shared) / "bench" if shared else None)
    parser.add_argument("--data", type=Path, default=Path(shared) / "data/gsm8k/train.jsonl" if shared else None)
    parser.add_argument("--only", choices=["rows", "packs"], help="full rows of random tokens, or packs of records")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="TRL's are measured from its sixth on")
    options = parser.parse_args()
    if options.peers is None or options.data is None:
        parser.error("give --peers and --data")
    with tempfile.TemporaryDirectory() as temp:
        model = f"{temp}/base"
        print(run([sys.executable, str(options.peers / "make_tiny.py"), str(options.data), model]).strip(), flush=True)
        found = contenders(options, model, Path(temp))
        if options.only:
            found = {name: contender for name, contender in found.items() if (name in ROWS) == (options.only == "rows")}
        speeds: dict[str, list[float]] = {name: [] for name in found}
        for index in range(options.rounds):
            order = list(found) if index % 2 == 0 else list(found)[::-1]
            for name in order:
                output = run(found[name].command)
                speeds[name].append(found[name].parse(output))
                print(f"round {index + 1}  {name:26} {speeds[name][-1]:7,.0f} tok/s{parts(output)}", flush=True)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    for name, median in medians.items():
        print(f"{name:26} median {median:7,.0f} tok/s  ({min(speeds[name]):,.0f}-{max(speeds[name]):,.0f})")
    if options.only != "packs":
        print(f"Baton / better bare loop:     {medians[ROWS[0]] / max(medians[ROWS[1]], medians[ROWS[2]]):.3f}")
    if options.only != "rows":
        packed = medians["Baton, packs, all trained"]
        print(f"Baton / TRL:                  {packed / medians['TRL SFTTrainer, packing']:.3f}")
        print(f"logits only where trained:    {medians['Baton, packs, real masks'] / packed:.3f}")


if __name__ == "__main__":
    main()
