"""Seconds from the kill of a worker to the next step, by parts; beside what plain Ray Train with DeepSpeed takes.

A tiny model trains on CPU workers (gloo), so that what is measured is what no model's size explains. Each round kills
one worker by SIGKILL some steps after a commit and watches the command's output:

- detect: until the driver says that the attempt failed
- place: until the next attempt begins (policy, survey of the checkpoints, room on the cluster)
- start: until its rank 0 says that it is there (processes, imports)
- build: until model, data and checkpoint are loaded
- step: until a step is done

The peer is the usual script: TorchTrainer with ``max_failures``, the model of transformers, ``deepspeed.initialize``,
``save_checkpoint`` and ``load_checkpoint`` every so many steps through ``ray.train.report``.

    python benchmarks/recovery_speed.py --rounds 3 --launcher processes ray --peer
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch.quickstart_inputs import make_inputs
from tests.support.command import Command, write_config

PARTS = ("detect", "place", "start", "build", "step")
EVERY = 10
ALIVE = "peer rank 0 pid"
Times = dict[str, float]


def values_of(folder: Path, launcher: str, name: str) -> dict[str, Any]:
    return {
        "model": {"base": str(folder / "base"), "precision": "fp32"},
        "data": {"train": str(folder / "train.jsonl"), "seq_len": 128, "prepared": str(folder / "prepared")},
        "training": {"global_batch": 4, "micro_batch": 2, "steps": 100_000, "log_every": 1},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "checkpoint": {"every_steps": EVERY},
        "cluster": {"launcher": launcher, "num_workers": 2, "cpus_per_worker": 1},
        "metrics": {"port": 0},
        "run": {"name": name, "storage": str(folder / "runs")},
    }


def recoveries(folder: Path, launcher: str, rounds: int) -> list[Times]:
    """Of one command that is disturbed once a round."""
    config = write_config(folder, values_of(folder, launcher, f"run-{launcher}"), launcher)
    command = Command("finetune", "--config", str(config))
    found = []
    try:
        step = EVERY + 3
        for attempt in range(1, rounds + 1):
            command.wait_for(rf"step {step}/\d+ ", 180)
            # Waited for, too: Ray passes on the lines of each worker when it likes.
            pid = int(command.wait_for(rf"attempt {attempt} \(\w+\): [\s\S]*worker rank 1 of 2: pid (\d+)")[1])
            marks = [time.perf_counter()]
            os.kill(pid, signal.SIGKILL)
            begun = rf"attempt {attempt + 1} \(\w+\): resuming from step (\d+)"
            for pattern in (
                rf"attempt {attempt} failed",
                begun,
                rf"{begun}[\s\S]*worker rank 0 of 2: pid",
                rf"{begun}[\s\S]*from step \d+ of",
                rf"{begun}[\s\S]*step \d+/\d+  loss",
            ):
                match = command.wait_for(pattern, 180)
                marks.append(time.perf_counter())
            step = int(match[1]) + EVERY + 3
            found.append(dict(zip(PARTS, (b - a for a, b in itertools.pairwise(marks)), strict=True)))
            show(f"{launcher}, round {attempt}", found[-1])
    finally:
        command.process.send_signal(signal.SIGTERM)
        command.finish(120)
    return found


def peer_recoveries(folder: Path, rounds: int) -> list[float]:
    """Seconds from the kill to the step after the one that it resumed from."""
    log = folder / "peer.log"
    script = Path(__file__).resolve().parent / "plain_ray_train.py"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder / "base"), str(folder / "peer")],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def steps(since: int = 0) -> list[int]:
        return [int(step) for step in re.findall(r"peer step (\d+)", log.read_text(errors="replace")[since:])]

    def until(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 240
        while not reached():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.02)

    found, begun = [], 0
    try:
        for number in range(1, rounds + 1):
            until(lambda begun=begun: len(steps(begun)) > EVERY + 2)  # type: ignore[misc]
            text = log.read_text(errors="replace")
            pid, begun = int(re.findall(r"peer rank 1 pid (\d+)", text)[-1]), len(text)
            killed = time.perf_counter()
            os.kill(pid, signal.SIGKILL)
            until(lambda begun=begun: ALIVE in log.read_text(errors="replace")[begun:])  # type: ignore[misc]
            begun += log.read_text(errors="replace")[begun:].index(ALIVE)
            until(lambda begun=begun: bool(steps(begun)))  # type: ignore[misc]
            found.append(time.perf_counter() - killed)
            print(f"plain Ray Train, round {number}: {found[-1]:.2f} s", flush=True)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return found


def show(name: str, times: Times) -> None:
    parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in times.items())
    print(f"{name}: {sum(times.values()):.2f} s ({parts})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--launcher", nargs="*", default=["processes", "ray"])
    parser.add_argument("--peer", action="store_true", help="plain Ray Train with DeepSpeed, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        make_inputs(folder, num_train=300, num_validation=20)
        medians = {}
        for launcher in options.launcher:
            found = recoveries(folder, launcher, options.rounds)
            medians[launcher] = {part: statistics.median(times[part] for times in found) for part in PARTS}
        for launcher, times in medians.items():
            show(f"{launcher}, medians of {options.rounds}", times)
        if options.peer:
            found = statistics.median(peer_recoveries(folder, options.rounds))
            print(f"plain Ray Train with DeepSpeed, median of {options.rounds}: {found:.2f} s")


if __name__ == "__main__":
    main()
