"""Bad input through the command: exit code 2, a message that says what to do, and nothing started."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from launch import checkpoints, finetune, prepare
from launch.cli import run_verb
from tests.integration.conftest import Workshop
from tests.support.command import write_config
from trainer.events import EventKind, EventLog
from trainer.run_directory import RunDirectory

Main = Callable[[list[str]], int]


def refuse(
    capfd: pytest.CaptureFixture[str], folder: Path, values: dict[str, Any], *overrides: str, main: Any = finetune.main
) -> str:
    """Run the verb; assert that it is refused and that no attempt was started. Returns stderr."""
    values = values | {"run": {"storage": str(folder / "runs")}}
    code = run_verb(main, ["--config", str(write_config(folder, values)), *overrides])
    message = capfd.readouterr().err
    assert code == 2, message
    assert not list(folder.glob("runs/*/attempts"))
    return message


def test_missing_data_file(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = refuse(capfd, tmp_path, workshop.values, f"data.train={tmp_path}/absent.jsonl")
    assert f"{tmp_path}/absent.jsonl: no such file. Check data.train" in message


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"question": "a", "answer": "b"}\n{"question": "a", "answ', ":2: not valid JSON"),
        ('{"question": "a", "answer": "b"}\n{"question": "a"}\n', ":2: 'answer' is missing"),
        ("\n\n", "the file holds no records"),
    ],
)
def test_bad_records(
    workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str], content: str, problem: str
) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text(content)
    message = refuse(capfd, tmp_path, workshop.values, f"data.train={data}", main=prepare.main)
    assert str(data) in message and problem in message


def copy_of_base(workshop: Workshop, folder: Path, *leave_out: str) -> Path:
    target = folder / "base"
    target.mkdir()
    for path in workshop.base.iterdir():
        if path.name not in leave_out:
            (target / path.name).write_bytes(path.read_bytes())
    return target


def test_tokenizer_without_chat_template(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = copy_of_base(workshop, tmp_path, "chat_template.jinja")
    message = refuse(capfd, tmp_path, workshop.values, f"model.base={base}")
    assert "has no chat template" in message and "data.chat_template" in message


def test_seq_len_beyond_the_models(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = refuse(capfd, tmp_path, workshop.values, "data.seq_len=1024")
    assert "data.seq_len=1024 is beyond" in message and "max_position_embeddings=512" in message


def test_base_with_pickled_weights_only(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = copy_of_base(workshop, tmp_path, "model.safetensors")
    torch.save({}, base / "pytorch_model.bin")
    message = refuse(capfd, tmp_path, workshop.values, f"model.base={base}")
    assert "only pickled weights (pytorch_model.bin)" in message and "safetensors only" in message


def test_base_that_comes_with_code(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = copy_of_base(workshop, tmp_path, "config.json")
    mapped = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    config = json.loads((workshop.base / "config.json").read_text()) | mapped
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    message = refuse(capfd, tmp_path, workshop.values, f"model.base={base}")
    assert "contains custom code" in message and "model.trust_remote_code=true" in message
    assert not (tmp_path / "ran").exists()


def test_missing_base(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = refuse(capfd, tmp_path, workshop.values, f"model.base={tmp_path}/nowhere")
    assert "no such directory" in message and "hub id" in message


def test_hub_out_of_reach(
    workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refuse(capfd, tmp_path, workshop.values, "model.base=nobody/nothing")
    assert "model.base='nobody/nothing'" in message and "give a local directory" in message


def test_unwritable_storage(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    message = refuse(capfd, tmp_path, workshop.values, f"run.storage={tmp_path}/file/runs")
    assert "can't be written" in message and "run.storage" in message


def test_checkpoints_of_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_verb(checkpoints.main, ["list", str(tmp_path)]) == 2
    assert "no run there" in capfd.readouterr().err


def test_dry_run_starts_nothing(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values = workshop.values | {"run": {"storage": str(tmp_path / "runs")}}
    assert run_verb(finetune.main, ["--config", str(write_config(tmp_path, values)), "--dry-run"]) == 0
    out = capfd.readouterr().out
    assert "40 steps of 6 packs, 2 workers × micro batch 2" in out and "nothing was started" in out
    assert not list(tmp_path.glob("runs/*/run.json"))


def test_overlong_answer_names_its_line(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "long.jsonl"
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": "word " * 400}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refuse(capfd, tmp_path, workshop.values, f"data.train={data}", "data.too_long=error")
    assert f"{data}:2:" in message and "data.seq_len=128" in message


def test_a_plan_that_does_not_fit(workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = refuse(capfd, tmp_path, workshop.values, "cluster.gpu_memory_gib=0.01")
    assert "the run does not fit: a worker needs" in message and "`baton plan` shows the whole plan" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to go on with")
def test_a_run_of_gpus_does_not_go_on_without(
    workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, workshop.values | {"run": {"storage": str(tmp_path)}}, "of-gpus")
    run = RunDirectory.at(str(tmp_path / "of-gpus"))
    start = run.start_attempt(None, None, ())
    EventLog(run, start.attempt).record(EventKind.TRAINING, "from step 0", device="cuda")
    assert run_verb(finetune.main, ["--config", str(config)]) == 2
    assert "cluster.use_gpu=false goes on with CPUs, on purpose" in capfd.readouterr().err
    assert len(run.lineage()) == 1
