"""Kills a run at every place where it touches a file, or fails it there, and looks at what the command says; gives the
command again, and compares the end bit by bit.

    python -m tests.support.chaos                   # every point, every kind
    python -m tests.support.chaos --sample 8 --seed 3

The command is the real one (``launch.finetune``, two worker processes, gloo); driver and workers are forks of this
process, which has imported everything once. The undisturbed run is traced to learn the points: before and after each
operation on a file by the driver and by each worker. Then, for each point and kind, a run of its own is disturbed
there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import cluster.local_processes
import trainer.checkpointing
import trainer.worker
from data_shards.fault_points import Kind
from launch import finetune
from launch.cli import run_verb
from launch.exit_codes import ExitCode
from launch.quickstart_inputs import make_base, records, write_jsonl
from tests.support.chaos_codes import expected_codes
from trainer.checkpoint import rank_file
from trainer.run_directory import RunDirectory
from trainer.survey import survey

WORKERS, STEPS, EVERY = 2, 6, 2
NAME = "chaos"
DEADLINE_S = 240


@dataclass(frozen=True)
class Case:
    """One disturbance. ``rank`` None: the driver."""

    scenario: str
    rank: int | None
    point: str
    kind: Kind

    def __str__(self) -> str:
        who = "driver" if self.rank is None else f"rank {self.rank}"
        return f"{self.kind} in {self.scenario!r}, {who} at {self.point!r}"


class Bench:
    """Data, a base and a configuration for runs that end in seconds; a folder for each run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        rows = records(60, seed=3)
        write_jsonl(root / "train.jsonl", rows)
        make_base(root / "base", [f"{row['question']} {row['answer']}" for row in rows], num_layers=1)

    def config(self, folder: Path, steps: int = STEPS, keep_last: int = 1, *, tiers: bool = False) -> Path:
        fast = {"path": str(folder / "here" / "nvme"), "every_steps": 1}
        values = {
            "model": {"base": str(self.root / "base"), "precision": "fp32"},
            "data": {
                "train": str(self.root / "train.jsonl"),
                "seq_len": 64,
                "prepared": str(self.root / "prepared"),
                "processes": 1,
            },
            "training": {"global_batch": 4, "micro_batch": 2, "steps": steps},
            "optimizer": {"lr": 1e-3, "schedule": "constant"},
            "checkpoint": {"every_steps": EVERY, "keep_last": keep_last, "fast": fast if tiers else None},
            "cluster": {"launcher": "processes", "num_workers": WORKERS},
            "run": {"storage": str(folder / "here" / "runs"), "name": NAME},
        }
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def submit(self, folder: Path, faults: dict[str, Any], **options: Any) -> int:
        """Give the command once. Returns its exit code, negative where it was killed."""
        pid = os.fork()
        if pid == 0:
            _be_the_driver(self.config(folder, **options), folder / "log", faults)
        return _wait(pid)

    def run(self, folder: Path) -> RunDirectory:
        return RunDirectory.at(str(folder / "here" / "runs" / NAME))

    def final_state(self, folder: Path) -> dict[str, bytes]:
        """Bytes of the last checkpoint's rank files. Raises AssertionError where the run is not finished."""
        usable = survey(self.run(folder)).usable
        assert usable and usable[-1].step == STEPS, f"ends at step {usable[-1].step if usable else None}"
        place = folder / "here" / "runs" / NAME / "checkpoints" / usable[-1].name
        return {rank_file(rank): (place / rank_file(rank)).read_bytes() for rank in range(WORKERS)}

    def prepare(self, scenario: str, folder: Path) -> None:
        """What a scenario begins with."""
        if scenario == CORRUPT:
            shutil.copytree(self.root / "damaged" / "here", folder / "here")

    def damage_a_run(self) -> None:
        """Two steps short of its end; the newest of its two checkpoints is damaged, to be quarantined and made anew."""
        folder = self.root / "damaged"
        assert self.submit(folder, {}, steps=STEPS - EVERY, keep_last=2) == 0, (folder / "log").read_text()
        usable = survey(self.run(folder)).usable
        assert [ref.step for ref in usable] == [STEPS - 2 * EVERY, STEPS - EVERY]
        victim = folder / "here" / "runs" / NAME / "checkpoints" / usable[-1].name / rank_file(1)
        damaged = bytearray(victim.read_bytes())
        damaged[-5] ^= 1
        victim.write_bytes(damaged)


FRESH, CORRUPT, TIERS = "fresh run", "resume from a damaged checkpoint", "two tiers"
OPTIONS: dict[str, dict[str, Any]] = {FRESH: {}, CORRUPT: {}, TIERS: {"tiers": True}}
"""of the configuration, by scenario"""


def _be_the_driver(config: Path, log: Path, faults: dict[str, Any]) -> None:
    """In a fork; never returns."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if faults:
        os.environ["BATON_FAULTS"] = json.dumps(faults)
    signal.alarm(DEADLINE_S)
    code = 70
    try:
        code = run_verb(finetune.main, ["--config", str(config)])
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def saves_end_before_the_next_step(assign: Callable[[type, str, Any], None] = setattr) -> None:
    """Tiny steps are faster than a file system: without this, which saves are left out would be chance."""
    told = trainer.checkpointing.Checkpointing.standing

    def standing(self: trainer.checkpointing.Checkpointing) -> Any:
        until = time.monotonic() + 5
        while self.saver.busy and time.monotonic() < until:
            time.sleep(0.002)
        self.saver._retention.wait(5)
        return told(self)

    assign(trainer.checkpointing.Checkpointing, "standing", standing)


def points_of(trace: Path) -> list[tuple[int | None, str]]:
    """Who reached what, each once, in order."""
    return list(dict.fromkeys((rank, point) for rank, point in map(json.loads, trace.read_text().splitlines())))


def cases(points: list[tuple[int | None, str]], scenario: str, kinds: list[Kind]) -> Iterator[Case]:
    for rank, point in points:
        for kind in kinds:
            if rank is None and kind == Kind.KILL_ALL:
                continue  # workers end with their driver
            if point.startswith("read") and kind in (Kind.ENOSPC, Kind.EROFS):
                continue
            yield Case(scenario, rank, point, kind)


def try_case(bench: Bench, case: Case, folder: Path, expected: dict[str, bytes]) -> str:
    """Returns what is wrong, or nothing."""
    bench.prepare(case.scenario, folder)
    mark = folder / "fired"
    faults = {"rank": case.rank, "point": case.point, "kind": case.kind, "mark": str(mark)}
    codes = [bench.submit(folder, faults, **OPTIONS[case.scenario])]
    if not mark.exists():
        return f"the fault did not fire (exit code {codes[0]})"
    if codes[0] != ExitCode.DONE:
        codes.append(bench.submit(folder, faults, **OPTIONS[case.scenario]))
    log = (folder / "log").read_text()
    if codes[-1] != ExitCode.DONE:
        return f"given again, the command did not finish: exit codes {codes}"
    wanted = expected_codes(case.rank, case.point, case.kind, quarantined=case.scenario == CORRUPT)
    if codes[0] not in wanted:
        return f"disturbed, the command ended with {codes[0]}, not with {' or '.join(map(str, sorted(wanted)))}"
    try:
        found = bench.final_state(folder)
    except AssertionError as error:
        return str(error)
    if found != expected:
        return "the final state is another one"
    return _lost_work(log)


def _lost_work(log: str) -> str:
    """Whether an attempt began before what had been committed and was not damaged."""
    good: set[int] = set()
    for line in log.splitlines():
        if found := re.search(r"committed step (\d+)(?: on the nodes)?:", line):
            good.add(int(found[1]))
        elif found := re.search(r"checkpoint (\d+)-[\w.]+ is not used", line):
            good.discard(int(found[1]))
        committed = max(good, default=0)
        found = re.search(r"attempt \d+ \(\w+\): (?:resuming from step (\d+)|from the beginning)", line)
        if found and int(found[1] or 0) < committed:
            return f"step {committed} was committed, and the next attempt began at {found[1] or 0}"
    return ""


def run_all(
    root: Path,
    kinds: list[Kind],
    sample: int | None,
    seed: int,
    part: tuple[int, int] = (1, 1),
    say: Callable[[str], None] = print,
) -> int:
    """Returns the number of cases that failed; their folders stay."""
    cluster.local_processes.start_method = lambda use_gpu: multiprocessing.get_context("fork")  # type: ignore[assignment,return-value]
    cluster.local_processes.GRACE_S = 0.5
    saves_end_before_the_next_step()
    bench = Bench(root)
    assert bench.submit(root / "first", {}) == 0, (
        root / "first" / "log"
    ).read_text()  # the data is prepared from now on
    bench.damage_a_run()
    todo: list[Case] = []
    expected: dict[str, dict[str, bytes]] = {}
    for scenario, options in OPTIONS.items():
        folder = root / f"undisturbed-{len(expected)}"
        bench.prepare(scenario, folder)
        trace = folder / "trace"
        folder.mkdir(parents=True, exist_ok=True)
        assert bench.submit(folder, {"trace": str(trace)}, **options) == 0, (folder / "log").read_text()
        expected[scenario] = bench.final_state(folder)
        points = points_of(trace)
        say(f"{scenario}: {len(points)} points")
        todo += cases(points, scenario, kinds)
    assert all(state == expected[FRESH] for state in expected.values()), "undisturbed runs differ"
    chosen = todo if sample is None else random.Random(seed).sample(todo, sample)
    number_of_part, parts = part
    chosen = chosen[number_of_part - 1 :: parts]
    say(f"{len(todo)} cases (points x kinds), {len(chosen)} to be tried")
    failed, started = 0, time.monotonic()
    for number, case in enumerate(chosen, 1):
        folder = root / f"case-{number}"
        problem = try_case(bench, case, folder, expected[case.scenario])
        failed += bool(problem)
        if problem:
            say(f"FAILED {case}: {problem}; see {folder}")
        else:
            shutil.rmtree(folder)
        if number % 20 == 0:
            say(f"{number} of {len(chosen)} tried in {time.monotonic() - started:.0f} s, {failed} failed")
    say(f"{len(chosen)} of {len(todo)} cases tried, {failed} failed")
    return failed


def _part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part: 1/4 to 4/4 are the four quarters")
    return int(number), int(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many cases, chosen by the seed; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(Kind), default=list(Kind))
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="every N-th case from the I-th on")
    parser.add_argument("--folder", type=Path, help="kept afterwards; default: a temporary one")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        root = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        root.mkdir(parents=True, exist_ok=True)
        say = lambda line: print(line, flush=True)  # noqa: E731
        kinds = [Kind(kind) for kind in options.kinds]
        return int(run_all(root.resolve(), kinds, options.sample, options.seed, options.part, say) > 0)


if __name__ == "__main__":
    sys.exit(main())
