"""Trouble beside the workers: clocks, other launchers, ports."""

from __future__ import annotations

import datetime
import os
import signal
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import trainer.run_directory
from launch.exit_codes import ExitCode
from tests.faults.bench import AT, EVERY, STEPS, Bench, Fired, Mark, Result, Trial, before_steps, rank
from tests.faults.processes import kill_driver
from tests.support.command import Command, descendants, slowed_tree

DAY_S = 86_400.0


def _jump(mark: Mark) -> None:
    """From the mark on the driver's clock is a day ahead, and rank 0's a day behind."""
    honest = time.time

    def by() -> float:
        return 0.0 if not mark.is_there else {None: DAY_S, 0: -DAY_S}.get(rank(), 0.0)

    class Jumping(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.fromtimestamp(honest() + by(), tz)

    time.time = lambda: honest() + by()
    trainer.run_directory.datetime = Jumping  # type: ignore[attr-defined]
    before_steps(lambda step: step == AT and rank() == 0 and mark.fire(step))


def clock_jump(bench: Bench) -> Result:
    """Meanwhile another launcher, whose clock is right, looks whether the first one is alive."""
    trial = bench.trial("clock")
    mark = trial.mark()
    running = trial.start(lambda: _jump(mark))
    mark.wait(running)
    assert trial.give() == ExitCode.HELD, trial.log
    assert running.wait() == ExitCode.DONE, trial.log
    assert len(trial.story.attempts) == 1
    trial.check_same_end()
    return Result(
        "the same end, bit for bit, in one attempt; a second launcher was refused meanwhile", trial.lost_steps
    )


def second_launcher(bench: Bench) -> Result:
    trial = bench.trial("second")
    mark = trial.mark()
    running = trial.start(lambda: before_steps(lambda step: step == AT and rank() == 0 and mark.fire(step)))
    mark.wait(running)
    began = time.monotonic()
    assert trial.give() == ExitCode.HELD, trial.log
    seconds = time.monotonic() - began
    assert not running.ended, "the first one must have been at work"
    assert running.wait() == ExitCode.DONE, trial.log
    trial.check_same_end()
    assert len(trial.story.attempts) == 1 and f"pid {running.pid}" in trial.log
    return Result(
        f"the second is refused with exit code 69 within {seconds:.1f} s, “held by another launcher”; the first comes "
        "to the same end, bit for bit",
        trial.lost_steps,
    )


def under_ray(trial: Trial, step_s: float = 0.3, **environment: str) -> Command:
    """The command as a process of its own, with a Ray of its own; its steps take so many seconds longer."""
    tree = trial.folder / "slowed"
    return Command(
        "finetune",
        *("--config", str(trial.config)),
        tree=tree if tree.exists() else slowed_tree(trial.folder, step_s),
        cwd=trial.folder,
        **environment,
    )


RAY = {"launcher": "ray", "num_workers": 2, "cpus_per_worker": 0.5}


def metrics_port_taken(bench: Bench) -> Result:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        trial = bench.trial("port", cluster=RAY, metrics={"port": holder.getsockname()[1]})
        command = under_ray(trial)
        assert command.finish() == ExitCode.DONE, command.output
    assert "can't be taken yet" in command.output and "metrics.port=" in command.output, command.output
    trial.check_same_end()
    return Result(
        "the same end, bit for bit, in one attempt; told: “metrics: … can't be taken yet … choose another”", 0
    )


def head_dies(bench: Bench) -> Result:
    """The driver is killed; then, in a run of its own, what Ray's head runs: its control store."""
    driver = kill_driver(bench)
    trial = bench.trial("head", cluster=RAY, metrics={"port": 0})
    # Without its store Ray's processes go on for a minute; here steps are slow, and that is short.
    first = under_ray(trial, 1.5, RAY_gcs_rpc_server_reconnect_timeout_s="2")
    try:
        first.wait_for(rf"step {AT}/{STEPS} ")
        stores = [pid for pid in descendants(first.process.pid) if "gcs_server" in _command_line(pid)]
        assert len(stores) == 1, stores
        os.kill(stores[0], signal.SIGKILL)
        code = first.finish(120)
    finally:
        first.kill()
    assert code != ExitCode.DONE, first.output
    reached, again = max(trial.files.steps()), time.time()  # the workers went on for a while
    second = under_ray(trial)
    assert second.finish() == ExitCode.DONE, second.output
    result = trial.survived(Fired(reached, again, stores[0]), "")
    assert trial.story.attempts[-1].from_step >= EVERY
    return Result(
        f"the driver: {driver.outcome} ({driver.lost_steps} steps lost, {driver.recovery_s:.1f} s); Ray's "
        f"control store: the command ends (exit code {code}); given again, the same end, bit for bit",
        result.lost_steps,
        result.recovery_s,
    )


def _command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
