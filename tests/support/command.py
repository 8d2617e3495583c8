"""Runs the command line as a user would: as a process, from a working tree, watched line by line."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.cli import run_verb

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """Offline, telemetry off, auth explicit; no leftovers of an outer Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return kept | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        **extra,
    }


class Command:
    """A started ``python launch/<verb>.py …`` whose output is collected as it comes."""

    def __init__(
        self,
        verb: str,
        *arguments: str,
        tree: Path = ROOT,
        cwd: Path | None = None,
        within: Sequence[str] = (),
        **extra: str,
    ) -> None:
        """
        Args:
            within: a command that runs the one given to it somewhere else.
            extra: of the environment.
        """
        self.process = subprocess.Popen(
            [*within, sys.executable, str(tree / "launch" / f"{verb}.py"), *arguments],
            cwd=cwd or tree,
            env=environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._changed = threading.Condition()
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = 120) -> re.Match[str]:
        """The first match of ``pattern`` in the output. Fails with the output if the command ends or time runs out."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while True:
                if found := re.search(pattern, self.output):
                    return found
                assert self.process.poll() is None and time.monotonic() < deadline, f"no {pattern!r} in:\n{self.output}"
                self._changed.wait(0.5)

    def finish(self, timeout_s: float = 240) -> int:
        code = self.process.wait(timeout_s)
        time.sleep(0.2)  # the collecting thread may have a last line to take
        return code

    def kill(self) -> None:
        """SIGKILL to the driver alone, as an out-of-memory killer would."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def run(verb: str, *arguments: str, timeout_s: float = 240, **options: Any) -> Command:
    command = Command(verb, *arguments, **options)
    command.finish(timeout_s)
    return command


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    """of the driver, both streams; its workers write past it"""


def run_here(main: Callable[[Sequence[str]], int], *arguments: str) -> Ended:
    """A verb in this process. Its local workers are forks of what the tests have imported: seconds, not a minute."""
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        code = run_verb(main, arguments)
    return Ended(code, output.getvalue())


Trace = list[tuple[float, float, int]]
"""(loss, gradient norm, digest of the rows) of every step"""


@dataclass(frozen=True)
class RunFiles:
    """What a run left in its folder."""

    path: Path

    @property
    def result(self) -> dict[str, Any]:
        return json.loads((self.path / "result.json").read_text())

    def steps(self) -> dict[int, dict[str, Any]]:
        """Step records by step, those of later attempts in place of earlier ones."""
        starts = [json.loads(path.read_text()) for path in self.path.glob("attempts/*/start.json")]
        found = {}
        for start in sorted(starts, key=lambda value: value["number"]):
            for path in sorted(self.path.glob(f"attempts/{start['attempt']}/steps/*.jsonl")):
                for line in path.read_text().splitlines():
                    record = json.loads(line)
                    found[record["step"]] = record
        return found

    def trace(self) -> Trace:
        """Of every step in order; fails if one is missing."""
        steps = self.steps()
        assert sorted(steps) == list(range(1, len(steps) + 1))
        return [(steps[i]["loss"], steps[i]["grad_norm"], steps[i]["rows_digest"]) for i in sorted(steps)]


def edited_tree(folder: Path, tree: Path = ROOT) -> Path:
    """A copy of a working tree in which somebody changed code meanwhile."""
    tree = _copied_tree(tree, folder / "edited")
    with (tree / "trainer" / "loop.py").open("a") as file:
        file.write("\n# an edit that changes nothing\n")
    _replace(tree / "trainer" / "progress_log.py", "ETA {eta}", "ETA {eta} (edited)")
    return tree


def slowed_tree(folder: Path, seconds: float) -> Path:
    """A copy of the working tree whose steps take so much longer, so that a command or a signal that is meant for the
    middle of a run does not come after its end."""
    tree = _copied_tree(ROOT, folder / "slowed")
    before = "    clock = StepClock(engine.device)\n"
    _replace(tree / "trainer" / "step.py", before, f"{before}    __import__('time').sleep({seconds})\n")
    return tree


def _copied_tree(tree: Path, folder: Path) -> Path:
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", "*.egg-info", ".hypothesis")
    return shutil.copytree(tree, folder, ignore=ignored)


def _replace(path: Path, text: str, by: str) -> None:
    before = path.read_text()
    assert text in before
    path.write_text(before.replace(text, by))


def write_config(folder: Path, values: dict[str, Any], name: str = "run") -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def descendants(pid: int) -> list[int]:
    """Pids of the living processes below this one, parents first."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    found, todo = [], [pid]
    while todo:
        children = [child for child, parent in parents.items() if parent == todo[0]]
        found += children
        todo = [*todo[1:], *children]
    return found
