"""Machines that come and go: figures of the run that ``tests/integration/test_many_nodes.py`` sends over Ray nodes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from launch import status
from launch.exit_codes import ExitCode
from tests.faults.bench import AT, STEPS, Bench, Fired, NotHere, Result, Trial
from tests.integration.test_many_nodes import OUTPUT, reached_without_notice
from tests.support.command import ROOT, Command, RunFiles, environment, slowed_tree
from tests.support.ray_network import Network, network
from trainer.events import EventKind
from trainer.run_directory import RunDirectory

VOYAGE = "integration/test_many_nodes.py"
LOST, GROWN, DRAINED = 1, 2, 3
"""Numbers of the attempts that ended so (``travel`` there)."""


@cache
def _travelled(folder: Path) -> Path:
    """The run's folder, once the tests have accepted what became of it."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / VOYAGE), "-q", "-rs", f"--basetemp={folder}"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    found = [path for path in folder.rglob("runs/traveller") if (path / "run.json").is_file()]
    if not found:
        raise NotHere(f"network namespaces: {done.stdout.splitlines()[-2]}")
    return found[0]


def _told(bench: Bench, number: int, how: Callable[[int], str]) -> Result:
    """How an attempt ended, and from its last sign of life when the run had got beyond it. ``how`` is asked with the
    number of the next attempt's workers."""
    path = _travelled(bench.root / "nodes")
    told = status.look(RunDirectory.at(str(path))).story
    attempt = next(attempt for attempt in told.attempts if attempt.number == number)
    after = next(attempt for attempt in told.attempts if attempt.number == number + 1)
    notices = [event.at for event in told.events if event.kind == EventKind.NOTICE and event.at >= attempt.started]
    records = [
        json.loads(line)
        for file in (path / "attempts" / attempt.id / "steps").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    last = max(record["time"] for record in records)
    struck = notices[0] if attempt.lost_steps == 0 and notices and notices[0] < after.started else last
    beyond = [record["time"] for step, record in RunFiles(path).steps().items() if step > attempt.to_step]
    assert after.num_workers is not None
    lost_steps = attempt.lost_steps
    if number == LOST:  # with its node a worker's own records are lost, back to those of the last 15 s or commit
        (output,) = (bench.root / "nodes").rglob(OUTPUT)
        lost_steps = max(0, reached_without_notice(output.read_text()) - after.from_step)
    return Result(how(after.num_workers), lost_steps, min(at for at in beyond if at > struck) - struck)


def raylet_dies(bench: Bench) -> Result:
    return _told(
        bench, LOST, lambda workers: f"goes on from the newest checkpoint on the node that is left ({workers} worker)"
    )


def shrink(bench: Bench) -> Result:
    return _told(bench, LOST, lambda workers: f"2 workers, then {workers}: the same rows, losses but for rounding")


def grow(bench: Bench) -> Result:
    return _told(
        bench, GROWN, lambda workers: f"1 worker, then {workers}, saved before: the same rows, losses but for rounding"
    )


def drain(bench: Bench) -> Result:
    return _told(
        bench, DRAINED, lambda workers: f"saves within the deadline, and goes on with {workers} worker elsewhere"
    )


def below_minimum(bench: Bench) -> Result:
    """Of two nodes one is lost, and both are wanted; later another comes."""
    workers = {"min": 2, "max": 2, "settle_s": 1}
    cluster = {"launcher": "ray", "num_workers": 2, "workers": workers, "cpus_per_worker": 1, "wait_for_room_s": 5}
    trial = bench.trial("below-minimum", cluster=cluster, metrics={"port": 0})
    tree = slowed_tree(trial.folder, 0.3)
    try:
        with network(trial.folder / "net") as net:
            net.start_head()
            net.start_node(num_cpus=1)
            lost = net.start_node(num_cpus=1)
            first = _submit(net, trial, tree)
            try:
                first.wait_for(rf"step {AT}/{STEPS} ")
                began = time.time()
                lost.kill_all()
                code = first.finish(120)
            finally:
                first.kill()
            assert code == ExitCode.STOPPED, first.output
            reason = trial.files.result["reason"]
            assert "the cluster had no room for the workers in time" in reason, reason
            net.start_node(num_cpus=1)
            second = _submit(net, trial, tree)
            assert second.finish() == ExitCode.DONE, second.output
    except pytest.skip.Exception as skipped:
        raise NotHere(str(skipped)) from skipped
    reached = max(int(step) for step in re.findall(rf"step (\d+)/{STEPS} ", first.output))
    result = trial.survived(Fired(reached, began, 0), "")
    return Result(
        "waits for cluster.wait_for_room_s, then stops with exit code 75: “the cluster had no room for the workers in "
        "time …”; given again with another node, the same end, bit for bit",
        reached - trial.story.attempts[-1].from_step,
        result.recovery_s,
    )


def _submit(net: Network, trial: Trial, tree: Path) -> Command:
    ray = {name: value for name, value in net.environment.items() if name.startswith(("RAY", "GLOO", "OMP"))}
    within = net.machines[0].within(net.disk)
    config = ("--config", str(trial.config))
    return Command("finetune", *config, tree=tree, cwd=tree.parent, within=within, RAY_ADDRESS=net.address, **ray)
