"""What the README shows is run as it stands there, with only paths and sizes exchanged; and so is the quickstart."""

from __future__ import annotations

import importlib.metadata
import io
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import Workshop
from tests.support.command import ROOT, run

README = (ROOT / "README.md").read_text()
BAD = ("Traceback", "baton:")
ELSEWHERE = ("launcher=", "baton stop", "baton submit")
"""What marks lines of ``baton`` that other tests run."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def of_others(line: str) -> bool:
    return any(mark in line for mark in ELSEWHERE)


@dataclass(frozen=True)
class Shell:
    """Runs README lines: what the installed ``baton`` calls, with the line's words, but in this process."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def run(self, line: str) -> str:
        words = shlex.split(line, comments=True)
        (script,) = importlib.metadata.entry_points(group="console_scripts", name=words[0])
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setattr(sys, "argv", words)
        output = io.StringIO()
        with redirect_stdout(output), redirect_stderr(output):
            code = script.load()()
        said = output.getvalue()
        assert code == 0 and not any(word in said for word in BAD), f"{line}\n{said}"
        return said


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the README's my.yaml, made small, and its data."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "data").mkdir()
    for name, source in (("train", "train"), ("held-out", "validation")):
        lines = (workshop.data / f"{source}.jsonl").read_text().splitlines()[:150]
        (folder / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    values = yaml.safe_load(blocks("yaml")[0])
    values["model"]["base"] = str(workshop.base)
    values["data"]["seq_len"] = 128
    values["training"] |= {"global_batch": 16, "micro_batch": 4}
    values["cluster"] = {"num_workers": 2, "launcher": "processes"}
    values["run"]["storage"] = str(folder / "runs")
    (folder / "my.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_the_verbs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("baton ")]
    lines = [line.replace("/shared/runs", str(folder / "runs")) for line in lines if not of_others(line)]
    assert len(lines) == 12
    shell = Shell(folder, monkeypatch)
    said = "\n".join(map(shell.run, lines))
    for expected in (
        "data: prepared at",
        "dry run: nothing was started",
        "finished: all steps are done",
        "run hotter in",
        "expected ",
        "exported step",
        "perplexity",
        "plan of my",
        "good  ",
        "W=2",
        "goodput ",
    ):
        assert expected in said, f"{expected!r} missing in:\n{said}"


def test_installed_command_answers() -> None:
    command = [str(Path(sys.executable).parent / "baton"), "--help"]
    done = subprocess.run(command, text=True, capture_output=True, check=True)
    assert "baton VERB" in done.stderr and "finetune" in done.stderr


def test_the_other_lines_are_run_elsewhere() -> None:
    """`make`, `ray job submit` and `torchrun` lines are those that other tests run."""
    rest = [
        line
        for block in blocks("bash")
        for line in block.splitlines()
        if not line.startswith("baton ") or of_others(line)
    ]
    known = (
        r"make (quickstart|test)",
        r"ray job submit --working-dir \. -- python launch/finetune\.py --config my\.yaml",  # test_ray_job.py
        r"baton finetune --config my\.yaml cluster\.launcher=processes +#.*",  # the_verbs
        r"baton submit --config my\.yaml --address http://head:8265",  # test_ray_job.py
        r"baton stop +--config my\.yaml +#.*",  # test_operating.py
        r"torchrun --nproc-per-node 8 launch/finetune\.py --config my\.yaml +#.*",  # test_recovery.py
    )
    for line in filter(None, rest):
        assert any(re.fullmatch(pattern, line) for pattern in known), line


def test_quickstart_learns(tmp_path: Path) -> None:
    """What `make quickstart` runs, to the letter, in an empty folder."""
    done = run("quickstart", cwd=tmp_path, timeout_s=400)
    assert done.process.returncode == 0, done.output
    before, after = map(float, re.search(r"held-out loss +before ([\d.]+) +after ([\d.]+)", done.output).groups())  # type: ignore[union-attr]
    assert before > 5 and after < 0.05, done.output
    accuracy = re.search(r"held-out accuracy +before (\d+)% +after (\d+)%", done.output)
    assert accuracy is not None and int(accuracy[1]) == 0 and int(accuracy[2]) >= 80, done.output
    exported = re.search(r"exported model +(\S+)", done.output)
    assert exported is not None and (tmp_path / exported[1] / "config.json").is_file()
    assert re.search(r"step 150/150  loss [\d.]+  lr [\d.e-]+  grad norm [\d.]+  [\d,]+ tok/s  ETA 0s", done.output)
