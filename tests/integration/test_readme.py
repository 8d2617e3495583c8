"""What the README shows is run as it stands there, with only paths and sizes exchanged; and so is the quickstart."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import Workshop
from tests.support.command import ROOT, environment, run

README = (ROOT / "README.md").read_text()
BAD = ("Traceback", "baton:")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def shell(command: str, cwd: Path) -> str:
    """Run one README line in ``cwd`` with the installed console script."""
    words = shlex.split(command, comments=True)
    assert words[0] == "baton"
    words[0] = str(Path(sys.executable).parent / "baton")
    done = subprocess.run(
        words, cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0 and not any(word in done.stdout for word in BAD), f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the README's my.yaml, made small, and its data."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "data").mkdir()
    for name, source in (("train", "train"), ("held-out", "validation")):
        (folder / "data" / f"{name}.jsonl").write_bytes((workshop.data / f"{source}.jsonl").read_bytes())
    values = yaml.safe_load(blocks("yaml")[0])
    values["model"]["base"] = str(workshop.base)
    values["data"]["seq_len"] = 128
    values["training"] |= {"global_batch": 16}
    values["cluster"] = {"num_workers": 2, "launcher": "processes"}
    values["run"]["storage"] = str(folder / "runs")
    (folder / "my.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_the_verbs(folder: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("baton ")]
    lines = [line.replace("/shared/runs", str(folder / "runs")) for line in lines if "launcher=" not in line]
    assert len(lines) == 11
    outputs = {line: shell(line, folder) for line in lines}
    said = "\n".join(outputs.values())
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
    ):
        assert expected in said, f"{expected!r} missing in:\n{said}"


def test_the_other_lines_are_run_elsewhere() -> None:
    """`make`, `ray job submit` and `torchrun` lines are those that other tests run."""
    rest = [
        line
        for block in blocks("bash")
        for line in block.splitlines()
        if not line.startswith("baton ") or "launcher=" in line
    ]
    known = (
        r"make (quickstart|test)",
        r"ray job submit --working-dir \. -- python launch/finetune\.py --config my\.yaml",  # test_ray_job.py
        r"baton finetune --config my\.yaml cluster\.launcher=processes +#.*",  # the_verbs
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
