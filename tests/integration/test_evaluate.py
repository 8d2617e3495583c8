"""`baton evaluate`: the same figures at any number of workers, equal to a plain transformers loop over the exports."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cluster.config import ClusterConfig
from cluster.lease import holding
from cluster.local_processes import LocalProcesses
from data_shards.errors import BadInput
from data_shards.reading.shard_reader import SplitReader
from launch import evaluate
from launch.cli import run_verb
from launch.config import Config, load_config
from launch.evaluate import Request, make_spec, run_evaluation
from launch.export import export_run
from launch.finetune import train
from launch.job import Job, make_job
from launch.quickstart_inputs import make_base
from tests.integration.conftest import Workshop
from tests.support.command import ROOT, environment, run_here, write_config
from tests.support.distributed import process_of_its_own
from tests.support.plain_loop import sequences
from tests.support.tiny import save_tiny_model
from trainer.survey import newest_usable

STEPS = 6


def workers(number: int) -> LocalProcesses:
    return LocalProcesses(ClusterConfig(num_workers=number))


@dataclass(frozen=True)
class Trained:
    job: Job
    file: Path
    """its configuration"""
    exported: Path

    @property
    def config(self) -> Config:
        return self.job.config

    @property
    def storage(self) -> Path:
        return Path(self.job.run.storage.uri)

    def scores(self, world_size: int, **request: Any) -> dict[str, Any]:
        return run_evaluation(make_spec(self.config, Request(**request)), workers(world_size))


def train_run(workshop: Workshop, folder: Path, name: str, **changes: Any) -> Trained:
    """A short run by two workers, and its export."""
    values = workshop.values | {"run": {"storage": str(folder / "runs")}}
    values["training"] = values["training"] | {"steps": STEPS, **changes}
    values["checkpoint"] = {"every_steps": 3, "keep_last": 2}
    values["optimizer"] = {"lr": 5e-3}
    values["model"] = values["model"] | {"precision": "bf16" if name.endswith("bf16") else "fp32"}
    file = write_config(folder, values, name)
    job = make_job(load_config(str(file)), print)
    with holding(job.run, print) as lease:
        assert train(job, workers(2), lease) == "finished"
    (exported,) = export_run(job.config, job.base).values()
    return Trained(job, file, Path(exported.uri))


@pytest.fixture(scope="module")
def full(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_run(workshop, tmp_path_factory.mktemp("full"), "full")


@pytest.fixture(scope="module")
def lora(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_run(workshop, tmp_path_factory.mktemp("lora"), "lora", method="lora")


@torch.no_grad()
def plain_scores(model: Any, trained: Trained, split: str) -> tuple[float, float]:
    """(perplexity, accuracy) by transformers alone, one sequence at a time."""
    model.eval()
    reader = SplitReader(trained.job.dataset.location, trained.job.dataset.manifest, split)
    loss, right, count = 0.0, 0, 0
    for row in range(reader.num_rows):
        for ids, labels in sequences(reader.pack(row)):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss += F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
            right += int((logits.argmax(-1) == labels).sum())
            count += int((labels != -100).sum())
    return math.exp(loss / count), right / count


def plain_base(trained: Trained) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(trained.job.base, dtype=torch.float32)


def plain_tuned(trained: Trained) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if trained.exported.name == "adapter":
        return PeftModel.from_pretrained(plain_base(trained), str(trained.exported))
    return AutoModelForCausalLM.from_pretrained(trained.exported, dtype=torch.float32)


def figures(result: dict[str, Any]) -> tuple[float, float]:
    return result["perplexity"], result["accuracy"]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_any_number_of_workers_gives_what_plain_transformers_gives(kind: str, request: pytest.FixtureRequest) -> None:
    trained: Trained = request.getfixturevalue(kind)
    model = plain_tuned(trained)
    expected = plain_scores(model, trained, "validation")
    for world_size in (1, 2, 3):
        result = trained.scores(world_size)
        print(f"{kind} W={world_size}: {figures(result)}, plain {expected}")
        assert figures(result) == pytest.approx(expected, rel=1e-6)
        assert (result["world_size"], result["step"], result["split"]) == (world_size, STEPS, "validation")
        assert 0 < result["correct_tokens"] < result["trained_tokens"]
    newest = newest_usable(trained.job.run)
    assert newest is not None
    eval_loss = newest.manifest.progress.eval_loss
    assert result["loss"] == pytest.approx(eval_loss, rel=1e-6), "training evaluated the same at its end"
    assert figures(trained.scores(2, folder=trained.exported)) == pytest.approx(figures(result), rel=1e-6)
    untouched = figures(trained.scores(2, base=True))
    assert untouched == pytest.approx(plain_scores(plain_base(trained), trained, "validation"), rel=1e-6)
    assert untouched[0] > 1.2 * result["perplexity"], "training must have moved it"
    assert not list(trained.storage.glob("evaluations/attempts/*")), "nothing is left but the results"


def test_an_earlier_step_and_bf16_adapters(workshop: Workshop, tmp_path: Path, full: Trained) -> None:
    earlier, last = full.scores(2, step=3), full.scores(2)
    assert (earlier["step"], last["step"]) == (3, STEPS) and earlier["loss"] > last["loss"]
    trained = train_run(workshop, tmp_path, "lora-bf16", method="lora")
    newest = newest_usable(trained.job.run)
    assert newest is not None
    result = trained.scores(2)
    assert result["precision"] == "bf16"
    assert result["loss"] == pytest.approx(newest.manifest.progress.eval_loss, rel=1e-6)


def check_output(output: str, trained: Trained, split: str = "validation") -> dict[str, Any]:
    """The result that the command wrote, which its line must show."""
    found = json.loads((trained.storage / "evaluations" / f"{split}-step-00000006.json").read_text())
    assert f"perplexity {found['perplexity']:.4f}" in output and f"accuracy {found['accuracy']:.2%}" in output
    assert found["world_size"] == 2 and f"{split}-step-00000006.json" in output
    return found


def test_the_command_with_local_processes_over_the_train_split(full: Trained) -> None:
    command = run_here(evaluate.main, "--config", str(full.file), "--split", "train", "--step", str(STEPS))
    assert command.code == 0, command.output
    found = check_output(command.output, full, "train")
    assert figures(found) == pytest.approx(plain_scores(plain_tuned(full), full, "train"), rel=1e-6)


def test_the_command_under_ray(full: Trained) -> None:
    expected = plain_scores(plain_tuned(full), full, "validation")
    ray = ["cluster.launcher=ray", "cluster.cpus_per_worker=0.5"]
    with process_of_its_own() as call:
        command = call(run_here, evaluate.main, "--config", str(full.file), *ray)
    assert command.code == 0, command.output
    assert figures(check_output(command.output, full)) == pytest.approx(expected, rel=1e-6)


def test_under_torchrun(full: Trained) -> None:
    expected = plain_scores(plain_tuned(full), full, "validation")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "launch" / "evaluate.py"), "--config", str(full.file)]
    done = subprocess.run(
        [*torchrun, *script], env=environment(OMP_NUM_THREADS="1"), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert figures(check_output(done.stdout, full)) == pytest.approx(expected, rel=1e-6)


def refuse(capfd: pytest.CaptureFixture[str], trained: Trained, *arguments: str) -> str:
    assert run_verb(evaluate.main, ["--config", str(trained.file), *arguments]) == 2
    return capfd.readouterr().err


def test_what_is_refused_before_workers_start(
    full: Trained, lora: Trained, workshop: Workshop, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "no checkpoint of step 5; there: 3, 6" in refuse(capfd, full, "--step", "5")
    assert "--split test: the data has no such split" in refuse(capfd, full, "--split", "test")
    no_validation = refuse(capfd, full, "data.validation=null")
    assert "there: train" in no_validation and "data.validation_fraction" in no_validation
    assert "no such directory" in refuse(capfd, full, "--model", str(tmp_path / "absent"))
    assert "has no config.json" in refuse(capfd, full, "--model", str(tmp_path))
    small = save_tiny_model(tmp_path / "small")
    assert "knows 97 tokens" in refuse(capfd, full, "--model", str(small))
    make_base(tmp_path / "stranger", ["other words make another tokenizer"] * 10)
    for path in workshop.base.glob("*.safetensors"):
        (tmp_path / "stranger" / path.name).write_bytes(path.read_bytes())
    stranger = json.loads((workshop.base / "config.json").read_text())
    (tmp_path / "stranger" / "config.json").write_text(json.dumps(stranger))
    assert "was trained with another" in refuse(capfd, full, "--model", str(tmp_path / "stranger"))
    moved = refuse(capfd, lora, f"model.base={full.exported}")
    assert "was trained on the base" in moved and "give the base that it was trained on" in moved
    odd = tmp_path / "odd"
    odd.mkdir()
    adapter = json.loads((lora.exported / "adapter_config.json").read_text())
    (odd / "adapter_config.json").write_text(json.dumps(adapter | {"use_dora": True}))
    assert "asks for {'use_dora': True}" in refuse(capfd, lora, "--model", str(odd))


def test_weights_of_another_model_are_named_by_the_workers(full: Trained, tmp_path: Path) -> None:
    """A base of the same tokenizer and another depth: only the workers see that the checkpoint does not fit."""
    other = tmp_path / "other"
    other.mkdir()
    for path in full.job.base.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    values = json.loads((other / "config.json").read_text())
    values["num_hidden_layers"] -= 1
    values.pop("layer_types", None)
    (other / "config.json").write_text(json.dumps(values))
    config = load_config(str(full.file), [f"model.base={other}"])
    with pytest.raises(BadInput, match="holds other parameters than this model"):
        run_evaluation(make_spec(config, Request()), workers(2))
