"""Runs of a tiny model to be disturbed, and what is measured of them.

Driver and workers are forks of this process, which has imported everything: a fault is a function that is called in the
driver's fork, where it may replace whatever the driver, or its workers after it, will use.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import yaml

import cluster.local_processes
import data_shards.storage
import trainer.loop
import trainer.progress_log
import trainer.worker
from cluster.failures import EndKind
from cluster.story import Story
from launch import finetune, status
from launch.cli import run_verb
from launch.exit_codes import ExitCode
from launch.quickstart_inputs import make_base, records, write_jsonl
from tests.support.checkpoints import committed
from tests.support.command import RunFiles, Trace
from trainer.checkpoint import CheckpointRef
from trainer.rank_file import RankFile
from trainer.run_directory import RunDirectory

WORKERS, STEPS, EVERY = 2, 12, 4
AT = 7
"""Steps that are done when most faults strike: three beyond a commit."""
PAUSE_S = 0.15
"""Before each step: enough for the save or the record of the one before it, so that what is lost is not chance."""
DEADLINE_S = 240

_CONFIGURATION = re.compile(r"^model:\n.*?^init_from: .*?\n", re.MULTILINE | re.DOTALL)
Install = Callable[[], object]
"""Called in the driver's fork, before the command."""
Verb = Callable[[Sequence[str]], int]


class NotHere(Exception):
    """This machine or this user can't have the fault injected."""


@dataclass(frozen=True)
class Result:
    """What became of a run that was disturbed."""

    outcome: str
    lost_steps: int | None = None
    """done, and done again"""
    recovery_s: float | None = None
    """from the fault to the end of the first step that had not been done before it"""


class Running:
    """A command that was given."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    @property
    def ended(self) -> bool:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def wait(self) -> int:
        """Its exit code, negative where it was killed."""
        while not self.ended:
            time.sleep(0.02)
        assert self._code is not None
        return self._code

    def send(self, number: signal.Signals) -> None:
        if not self.ended:
            os.kill(self.pid, number)


@dataclass(frozen=True)
class Trial:
    """A run of its own, to be disturbed: its folder, its configuration, what it left."""

    bench: Bench
    folder: Path
    values: dict[str, Any]

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def path(self) -> Path:
        """Of the run's folder."""
        return Path(self.values["run"]["storage"]) / self.values["run"]["name"]

    @property
    def run(self) -> RunDirectory:
        return RunDirectory.at(str(self.path))

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.path)

    @property
    def log(self) -> str:
        """What all commands and workers said, but for the configurations."""
        return _CONFIGURATION.sub("", (self.folder / "log").read_text())

    @property
    def newest(self) -> CheckpointRef:
        return committed(self.run.checkpoints)[-1]

    @property
    def story(self) -> Story:
        return status.look(self.run).story

    def start(self, *installs: Install, verb: Verb = finetune.main, arguments: Sequence[str] = ()) -> Running:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            self._be_the_driver(installs, verb, arguments)
        return Running(pid)

    def give(self, *installs: Install, verb: Verb = finetune.main, arguments: Sequence[str] = ()) -> int:
        """The command, to its end; returns its exit code."""
        return self.start(*installs, verb=verb, arguments=arguments).wait()

    def _be_the_driver(self, installs: Sequence[Install], verb: Verb, arguments: Sequence[str]) -> None:
        """Never returns."""
        code = 1
        try:
            os.setsid()
            descriptor = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            signal.alarm(DEADLINE_S)
            for install in installs:
                install()
            pause_before_steps()
            code = run_verb(verb, ["--config", str(self.config), *arguments])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def wait_for(self, text: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not (self.folder / "log").exists() or text not in self.log:
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.log}"
            time.sleep(0.02)

    def mark(self, name: str = "fired") -> Mark:
        return Mark(self.folder / name)

    def check_same_end(self) -> None:
        """Raises AssertionError where anything differs from the run that was left alone."""
        assert self.files.trace() == self.bench.undisturbed.trace, "losses, norms or rows differ"
        assert self.newest.step == STEPS and self.newest.manifest.files == self.bench.undisturbed.files, (
            "the last checkpoint differs"
        )

    def survived(self, fired: Fired, how: str) -> Result:
        """The run came to the same end as the one that was left alone: with these losses after ``fired``."""
        self.check_same_end()
        return Result(f"the same end, bit for bit; {how}", self.lost_steps, self.recovery_s(fired))

    @property
    def lost_steps(self) -> int:
        return self.story.totals.lost_steps

    def recovery_s(self, fired: Fired) -> float:
        times = [record["time"] for step, record in self.files.steps().items() if step > fired.step]
        return min(at for at in times if at > fired.at) - fired.at

    @property
    def ends(self) -> list[str]:
        """Why each attempt ended, oldest first."""
        return [f"{attempt.state}: {attempt.reason}" for attempt in self.story.attempts]

    def num_failed(self) -> int:
        return sum(attempt.state == EndKind.FAILED for attempt in self.story.attempts)


@dataclass(frozen=True)
class Fired:
    """When a fault struck."""

    step: int
    """that were done by then"""
    at: float
    """Unix seconds"""
    pid: int


@dataclass(frozen=True)
class Mark:
    """A file that tells whether, and when, a fault has struck."""

    path: Path

    def fire(self, step: int) -> bool:
        """Whether it is the first time; only then should the fault strike."""
        try:
            with self.path.open("x") as file:
                json.dump({"step": step, "at": time.time(), "pid": os.getpid()}, file)
        except FileExistsError:
            return False
        return True

    @property
    def is_there(self) -> bool:
        return self.path.exists()

    @property
    def fired(self) -> Fired:
        """Raises AssertionError where the fault did not strike."""
        assert self.is_there, f"the fault did not strike: no {self.path}"
        return Fired(**json.loads(self.path.read_text()))

    def wait(self, running: Running, timeout_s: float = 90) -> Fired:
        deadline = time.monotonic() + timeout_s
        while not self.is_there:
            assert not running.ended and time.monotonic() < deadline, "the fault did not strike"
            time.sleep(0.01)
        time.sleep(0.05)  # it is written whole
        return self.fired


class BeforeStep(Protocol):
    def __call__(self, step: int) -> object: ...


def before_steps(action: BeforeStep) -> None:
    """Have this called in all workers before each step, with the number of those that are done."""
    train_step = trainer.loop.train_step

    def disturbed(*arguments: Any, **options: Any) -> Any:
        action(options["step"])
        return train_step(*arguments, **options)

    trainer.loop.train_step = disturbed


_done = 0


def pause_before_steps() -> None:
    def pause(step: int) -> None:
        global _done
        _done = step
        time.sleep(PAUSE_S)

    trainer.progress_log.SO_FAR_EVERY_S = PAUSE_S / 4  # else what a killed rank 0 had done would not be known
    before_steps(pause)


def steps_done() -> int:
    """By this worker, in its attempt and before."""
    return _done


def rank() -> int | None:
    """Of this process; None in the driver."""
    found = os.environ.get("RANK")
    return None if found is None else int(found)


def at_step(mark: Mark, action: Callable[[], object], *, ranks: Sequence[int] = (1,), step: int = AT) -> Install:
    """Have this done, once in all, before the step that follows these."""
    return lambda: before_steps(lambda done: done == step and rank() in ranks and mark.fire(done) and action())


def at_file(
    mark: Mark, operation: str, path: str, action: Callable[[], object], *, ranks: Sequence[int | None] = (1,)
) -> Install:
    """Have this done, once in all, at an operation (``fault_points``) on a file whose path matches."""

    def install() -> None:
        reach = data_shards.storage.reach

        def disturbed(reached: str, at: str | os.PathLike[str]) -> None:
            reach(reached, at)
            if reached == operation and re.search(path, str(at)) and rank() in ranks and mark.fire(steps_done()):
                action()

        data_shards.storage.reach = disturbed

    return install


@dataclass(frozen=True)
class Undisturbed:
    """The run that was left alone."""

    trace: Trace
    files: tuple[RankFile, ...]
    """of its last checkpoint, with their hashes"""
    seconds: float
    """from its first attempt's start to its end"""


class Bench:
    """Data, a base, the run that is left alone, and a folder for each that is not."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # The libraries are imported, and no thread of theirs runs in this process: workers can be forks of it.
        cluster.local_processes.start_method = lambda use_gpu: multiprocessing.get_context("fork")  # type: ignore[assignment,return-value]
        rows = records(120, seed=3)
        write_jsonl(root / "train.jsonl", rows[10:])
        write_jsonl(root / "validation.jsonl", rows[:10])
        make_base(root / "base", [f"{row['question']} {row['answer']}" for row in rows])

    def trial(self, name: str, **sections: dict[str, Any]) -> Trial:
        """Args: sections: of the configuration, with what is to be otherwise in them."""
        folder = self.root / name
        folder.mkdir()
        values: dict[str, dict[str, Any]] = {
            "model": {"base": str(self.root / "base"), "precision": "fp32"},
            "data": {
                "train": str(self.root / "train.jsonl"),
                "validation": str(self.root / "validation.jsonl"),
                "seq_len": 64,
                "prepared": str(self.root / "prepared"),
                "processes": 1,
            },
            "training": {"global_batch": 4, "micro_batch": 2, "steps": STEPS},
            "optimizer": {"lr": 1e-3, "schedule": "constant"},
            "checkpoint": {"every_steps": EVERY, "keep_last": 2},
            "cluster": {"launcher": "processes", "num_workers": WORKERS},
            "run": {"storage": str(folder / "runs"), "name": "run"},
        }
        for section, changes in sections.items():
            values[section] = values.get(section, {}) | changes
        trial = Trial(self, folder, values)
        trial.config.write_text(yaml.safe_dump(values))
        return trial

    @cached_property
    def undisturbed(self) -> Undisturbed:
        trial = self.trial("undisturbed")
        assert trial.give() == ExitCode.DONE, trial.log
        return Undisturbed(trial.files.trace(), trial.newest.manifest.files, trial.story.totals.elapsed_s)
