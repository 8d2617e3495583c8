"""Goodput of a run that loses a worker about every 100 steps, beside what a model of it predicts.

A tiny model trains with two worker processes, each step slowed to about a tenth of a second; a worker is killed by
SIGKILL at steps drawn from a seed; checkpoints every 10 steps. Goodput is what ``baton status`` tells: seconds of steps
that count, of all seconds since the first attempt began. The model takes what was measured of this very run:

    1 - stall / T_ckpt - (R + T_ckpt / 2) / MTBF

with the stall of a checkpoint, seconds T_ckpt between two, seconds R from a kill to the next attempt's first step,
and seconds MTBF between kills.

    python benchmarks/goodput.py --kills 10 --seed 1
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.recovery_speed import EVERY, values_of
from launch.quickstart_inputs import make_inputs
from tests.support.command import ROOT, Command, RunFiles, slowed_tree, write_config

BETWEEN_KILLS = 100


@dataclass(frozen=True)
class Killed:
    recovery_s: float
    """from the kill to the next attempt's first step"""
    lost_steps: int
    """that were printed, and done again"""


def killed_now_and_then(command: Command, kills: list[int]) -> list[Killed]:
    """Kill a worker at each of these steps."""
    found = []
    for number, step in enumerate(kills, 1):
        command.wait_for(rf"step {step}/\d+  loss", 300)
        pids = re.findall(r"worker rank [01] of 2: pid (\d+)", command.output)[-2:]
        killed = time.perf_counter()
        os.kill(int(random.choice(pids)), signal.SIGKILL)
        begins = rf"attempt {number + 1} \(\w+\): resuming from step (\d+)"
        start = int(command.wait_for(begins, 120)[1])
        reached = int(re.findall(r"step (\d+)/\d+  loss", command.output)[-1])
        command.wait_for(rf"{begins}[\s\S]*step {start + 1}/\d+  loss", 120)
        found.append(Killed(time.perf_counter() - killed, reached - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--step-seconds", type=float, default=0.1, help="that each step is slowed by")
    options = parser.parse_args()
    random.seed(options.seed)
    kills = [random.randint(-10, 10) + BETWEEN_KILLS * number for number in range(1, options.kills + 1)]
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        make_inputs(folder, num_train=300, num_validation=20)
        values = values_of(folder, "processes", "goodput")
        values["training"] |= {"steps": kills[-1] + BETWEEN_KILLS // 2}
        values["export"] = {"at_end": False}
        config = write_config(folder, values)
        tree = slowed_tree(folder, options.step_seconds)
        command = Command("finetune", "--config", str(config), tree=tree, cwd=folder)
        killed = killed_now_and_then(command, kills)
        assert command.finish(600) == 0, command.output
        status = [sys.executable, str(ROOT / "launch" / "status.py"), "--config", str(config), "--json"]
        told = json.loads(subprocess.run(status, check=True, capture_output=True, text=True).stdout)
        result = RunFiles(folder / "runs" / "goodput").result
    report(told, result, killed, kills)


def report(told: dict[str, Any], result: dict[str, Any], killed: list[Killed], kills: list[int]) -> None:
    totals = told["story"]["totals"]
    lost = [one.lost_steps for one in killed]
    step_s = totals["kept_s"] / result["step"]
    checkpoint_s = EVERY * step_s
    stall_s = result["seconds"]["checkpoint"] / (result["step"] / EVERY)
    mtbf_s = totals["elapsed_s"] / len(kills)
    recovery_s = statistics.mean(one.recovery_s for one in killed)
    predicted = 1 - stall_s / checkpoint_s - (recovery_s + checkpoint_s / 2) / mtbf_s
    print(f"{len(kills)} kills, at steps {', '.join(map(str, kills))} of {result['step']}")
    print(f"lost steps {lost}: at most {max(lost)}, with a checkpoint every {EVERY}")
    print(
        f"step {step_s:.3f} s, R {recovery_s:.2f} s, stall {stall_s * 1000:.1f} ms, T_ckpt {checkpoint_s:.2f} s, "
        f"MTBF {mtbf_s:.1f} s"
    )
    print(f"goodput {totals['goodput']:.3f}; the model says {predicted:.3f}; {totals['goodput'] / predicted:.3f} of it")


if __name__ == "__main__":
    main()
