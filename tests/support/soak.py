"""``make soak``: one run, for hours, under random faults from a seed; then what became of it.

Kills and stops of workers and of the driver, damaged checkpoints, a disk that is full for a while, second launchers,
notices: each a while after the run has gone on from the one before. In the end the run is told to stop and brought to
an end, and must equal a run that was left alone: rows, losses and the last checkpoint's files. No process and no
unfinished checkpoint's folder may be left; open files and memory of the drivers are told.

    python -m tests.support.soak --minutes 120 --seed 1 --launcher processes
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from launch import finetune
from launch.quickstart_inputs import make_inputs
from tests.support.command import Command, RunFiles, descendants, run_here, write_config
from tests.support.disk import disk_of
from trainer.run_directory import RunDirectory
from trainer.survey import survey

EVERY, ENDLESS = 5, 1_000_000
_PATIENCE_S = 300
_DISK_BYTES = 300 << 20
_FULL_S = 30
"""The disk stays full until a save found it so, or for so long."""


@dataclass
class Sample:
    """Of a driver between two faults."""

    pid: int
    files: int
    """open file descriptors"""
    resident_bytes: int


class Process(NamedTuple):
    """Pids come again after hours, so that a pid alone is nobody."""

    pid: int
    started: str
    """clock ticks since the machine's start"""


def process_of(pid: int) -> Process | None:
    """None where there is none."""
    with suppress(OSError):
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return Process(pid, status[19])  # field 22 of proc(5), and the name in brackets is the second
    return None


def processes_at(folder: Path) -> list[int]:
    """Of all but this one, those that have something of it mapped, or on their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            told = (place / "cmdline").read_bytes() + (place / "maps").read_bytes()
            if str(folder).encode() in told and int(place.name) != os.getpid():
                found.append(int(place.name))
    return found


@dataclass
class Soak:
    folder: Path
    launcher: str
    seed: int
    done: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    workers: set[Process] = field(default_factory=set)
    """all that there ever were"""

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.config = write_config(self.folder, self.values("soak"), "soak")
        self.files = RunFiles(self.folder / "runs" / "soak")
        self.command = self._begun()

    def values(self, name: str) -> dict[str, Any]:
        return {
            "model": {"base": str(self.folder / "base"), "precision": "fp32"},
            "data": {
                "train": str(self.folder / "train.jsonl"),
                "seq_len": 128,
                "prepared": str(self.folder / "prepared"),
            },
            "training": {"global_batch": 4, "micro_batch": 2, "steps": ENDLESS, "log_every": 1},
            "optimizer": {"lr": 1e-4, "schedule": "constant"},
            "checkpoint": {"every_steps": EVERY, "keep_last": 3},
            "watchdog": {"at_least_s": 8},
            "cluster": {
                "launcher": self.launcher,
                "num_workers": 2,
                "cpus_per_worker": 1,
                "notice_file": str(self.folder / "leaving"),
            },
            "metrics": {"port": 0},
            "run": {"name": name, "storage": str(self.folder / "runs")},
        }

    def _begun(self, *overrides: str) -> Command:
        return Command("finetune", "--config", str(self.config), *overrides)

    def faults(self) -> dict[str, Callable[[], None]]:
        return {
            "SIGKILL of a worker": lambda: self._signal_worker(signal.SIGKILL),
            "SIGSEGV of a worker": lambda: self._signal_worker(signal.SIGSEGV),
            "SIGSTOP of a worker": lambda: self._signal_worker(signal.SIGSTOP),
            "SIGKILL of both workers": self._kill_both,
            "SIGTERM of the driver": self._stop_driver,
            "SIGKILL of the driver": self._kill_driver,
            "the newest checkpoint is damaged, a worker killed": self._damage_newest,
            "the disk is full for a while": self._fill_disk,
            "a second launcher": self._launch_twice,
            "a launcher that takes the run over": self._take_over,
            "`baton stop`": self._stop_by_name,
            **self._faults_of_launcher(),
        }

    def _faults_of_launcher(self) -> dict[str, Callable[[], None]]:
        if self.launcher == "ray":
            return {"SIGTERM of a worker": lambda: self._signal_worker(signal.SIGTERM)}
        return {"SIGTERM of all its processes": self._stop_all, "a notice by a file": self._give_notice}

    def _workers(self) -> list[int]:
        """Pids of ranks 0 and 1."""
        found = [re.findall(rf"worker rank {rank} of 2: pid (\d+)", self.command.output) for rank in (0, 1)]
        pids = [int(of_rank[-1]) for of_rank in found if of_rank]
        self.workers |= set(filter(None, map(process_of, pids)))
        return pids

    def _signal_worker(self, signum: signal.Signals) -> None:
        os.kill(self.random.choice(self._workers()), signum)

    def _kill_both(self) -> None:
        for pid in self._workers():
            os.kill(pid, signal.SIGKILL)

    def _stop_driver(self) -> None:
        self.command.process.send_signal(signal.SIGTERM)
        assert self.command.finish(_PATIENCE_S) == 75, self.command.output[-4000:]
        self.command = self._begun()

    def _stop_all(self) -> None:
        """Workers, and what starts them, leave it to the driver."""
        for pid in descendants(self.command.process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        self._stop_driver()

    def _kill_driver(self) -> None:
        self.command.kill()
        time.sleep(3)  # its workers follow
        self.command = self._begun()

    def _damage_newest(self) -> None:
        newest = survey(RunDirectory.at(str(self.files.path))).usable[-1]
        path = self.files.path / "checkpoints" / newest.name / newest.manifest.files[0].path
        content = bytearray(path.read_bytes())
        content[self.random.randrange(len(content))] ^= 1 << self.random.randrange(8)
        path.write_bytes(content)
        self._signal_worker(signal.SIGKILL)

    def _fill_disk(self) -> None:
        """Until something said so. Where old checkpoints could make room the run goes on; else it stops with 75."""
        before, ballast = len(self.command.lines), self.files.path.parent / "ballast"
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        until = time.monotonic() + _FULL_S
        while self.command.process.poll() is None and time.monotonic() < until:
            if re.search("disk is full|No space left", "\n".join(self.command.lines[before:])):
                break
            time.sleep(0.1)
        ballast.unlink()
        time.sleep(2)
        if self.command.process.poll() is not None:
            assert self.command.finish() == 75, self.command.output[-4000:]
            self.command = self._begun()

    def _launch_twice(self) -> None:
        second = self._begun()
        assert second.finish(_PATIENCE_S) == 69, second.output

    def _take_over(self) -> None:
        second = self._begun("--take-over")
        assert self.command.finish(_PATIENCE_S) == 69, self.command.output[-4000:]
        self.command = second

    def _stop_by_name(self) -> None:
        stop = Command("stop", "--config", str(self.config))
        assert stop.finish(_PATIENCE_S) == 0, stop.output
        assert self.command.finish(_PATIENCE_S) == 75, self.command.output[-4000:]
        self.command = self._begun()

    def _give_notice(self) -> None:
        """This machine is all there is, so the run saves and stops."""
        leaving = self.folder / "leaving"
        leaving.write_text("20")
        assert self.command.finish(_PATIENCE_S) == 75, self.command.output[-4000:]
        leaving.unlink()
        self.command = self._begun()

    def reached(self) -> int:
        """The last step that the present command has printed."""
        return int((re.findall(r"step (\d+)/\d+  loss", self.command.output) or ["0"])[-1])

    def goes_on(self) -> None:
        """Until some more steps were done, a commit among them."""
        before, deadline = len(self.command.lines), time.monotonic() + _PATIENCE_S
        while True:
            later = "\n".join(self.command.lines[before:])
            steps = re.findall(r"step (\d+)/\d+  loss", later)
            if len(steps) > 2 * EVERY and "committed step" in later:
                break
            assert self.command.process.poll() is None and time.monotonic() < deadline, self.command.output[-6000:]
            time.sleep(0.2)
        self._workers()
        self.samples.append(sample(self.command.process.pid))

    def disturb(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        faults = self.faults()
        self.goes_on()
        while time.monotonic() < until:
            name = self.random.choice(sorted(faults))
            print(f"{time.strftime('%H:%M:%S')} step {self.reached()}: {name}", flush=True)
            faults[name]()
            self.done[name] += 1
            self.goes_on()
            if len(self.command.lines) > 20_000:  # a fresh command now and then, whose output can be searched
                self._stop_driver()
                self.goes_on()

    def finish(self) -> int:
        """Returns the run's last step."""
        self.command.process.send_signal(signal.SIGTERM)
        assert self.command.finish(_PATIENCE_S) == 75
        last = int(self.files.result["step"]) + 5
        done = self._begun(f"training.steps={last}")
        assert done.finish(_PATIENCE_S) == 0, done.output[-4000:]
        self.command = done
        self._workers()
        return last


def sample(pid: int) -> Sample:
    status = Path(f"/proc/{pid}/status").read_text()
    resident = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]
    return Sample(pid, len(list(Path(f"/proc/{pid}/fd").iterdir())), resident)


def growth(samples: list[Sample]) -> list[str]:
    """Of each driver that saw several faults: file descriptors and MiB at its second sample, and at its last."""
    told = []
    for pid in dict.fromkeys(sample.pid for sample in samples):
        mine = [sample for sample in samples if sample.pid == pid]
        if len(mine) > 3:
            first, last = mine[1], mine[-1]
            mib = [round(sample.resident_bytes / 2**20) for sample in (first, last)]
            told.append(f"{len(mine)} samples: {first.files} to {last.files} files, {mib[0]} to {mib[1]} MiB")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--launcher", choices=["processes", "ray"], default="processes")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    make_inputs(folder, num_train=600, num_validation=20)
    with disk_of(folder / "runs", _DISK_BYTES):
        soak = Soak(folder, options.launcher, options.seed)
        try:
            soak.disturb(60 * options.minutes)
            report(soak, soak.finish())
        except BaseException:
            soak.command.kill()
            print(soak.command.output[-20_000:], file=(folder / "last-output").open("w"))
            shutil.copytree(folder / "runs", folder / "kept")  # the disk goes
            raise
    shutil.rmtree(folder)


def report(soak: Soak, last: int) -> None:
    """Prints all figures. Raises AssertionError where something is not as it should be."""
    for name, number in sorted(soak.done.items()):
        print(f"{number:4} x {name}")
    files = [sample.files for sample in soak.samples]
    attempts = soak.files.result["attempts"]
    print(
        f"{sum(soak.done.values())} faults from seed {soak.seed}, {attempts} attempts, {last} steps, "
        f"{len(soak.workers)} workers"
    )
    print(f"open files of drivers: {min(files)} to {max(files)}, median {statistics.median(files):g}")
    for line in growth(soak.samples):
        print(f"  a driver, {line}")
    print(json.dumps({"faults": dict(soak.done), "steps": last}), flush=True)
    time.sleep(5)  # processes that were told to end do so
    left = [worker.pid for worker in soak.workers if process_of(worker.pid) == worker]
    assert not left, f"workers that are still there: {left}"
    assert not (holding := processes_at(soak.folder)), f"processes that have files of the run: {holding}"
    found = survey(RunDirectory.at(str(soak.files.path)))
    assert not found.unfinished, f"folders that nothing looks after: {found.unfinished}"
    values = soak.values("alone") | {"cluster": {"launcher": "processes", "num_workers": 2}}
    values["training"] |= {"steps": last}
    alone = run_here(finetune.main, "--config", str(write_config(soak.folder, values, "alone")))
    assert alone.code == 0, alone.output
    undisturbed = RunFiles(soak.folder / "runs" / "alone")
    assert soak.files.trace() == undisturbed.trace(), "rows or losses differ"
    ends = [survey(RunDirectory.at(str(files.path))).usable[-1].manifest.files for files in (soak.files, undisturbed)]
    assert ends[0] == ends[1], "the last checkpoints differ"
    print(
        "rows, losses and the last checkpoint are those of the run that was left alone; no worker is left; "
        f"{len(found.bad)} damaged checkpoints set aside; no folder without a commit"
    )


if __name__ == "__main__":
    main()
