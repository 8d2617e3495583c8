"""A LoRA run keeps the adapter only, and goes on with no base but its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_shards.storage import Storage
from launch import export, finetune
from tests.integration.conftest import Workshop
from tests.support.checkpoints import committed
from tests.support.command import Ended, RunFiles, run_here, write_config
from trainer.base_identity import base_identity
from trainer.config import ModelConfig
from trainer.run_directory import RunDirectory

BYTES_PER_PARAMETER = 12
"""fp32 master weight and two Adam states"""


class LoraRun:
    """A run of its own base, which can be tampered with."""

    def __init__(self, workshop: Workshop, folder: Path) -> None:
        self.base = Path(shutil.copytree(workshop.base, folder / "base"))
        values: dict[str, Any] = workshop.values | {
            "model": workshop.values["model"] | {"base": str(self.base)},
            "training": {"global_batch": 4, "steps": 2, "method": "lora"},
            "run": {"storage": str(folder / "runs")},
        }
        self.config = write_config(folder, values, "adapted")
        self.files = RunFiles(folder / "runs" / "adapted")

    def finetune(self, *overrides: str) -> Ended:
        return run_here(finetune.main, "--config", str(self.config), *overrides)

    def attempts(self) -> int:
        return len(list(self.files.path.parent.glob("*/attempts/*/start.json")))

    @contextmanager
    def changed(self, name: str) -> Iterator[None]:
        """One byte of one of the base's files is another: of weights a bit flipped, of JSON a line end more."""
        original = (self.base / name).read_bytes()
        other = original + b"\n" if name.endswith(".json") else original[:-1] + bytes([original[-1] ^ 1])
        (self.base / name).write_bytes(other)
        try:
            yield
        finally:
            (self.base / name).write_bytes(original)


@pytest.fixture(scope="module")
def lora(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> LoraRun:
    run = LoraRun(workshop, tmp_path_factory.mktemp("lora"))
    done = run.finetune()
    assert done.code == 0, done.output
    return run


def test_a_checkpoint_holds_what_is_trained_and_nothing_else(lora: LoraRun) -> None:
    checkpoints = RunDirectory.at(str(lora.files.path)).checkpoints
    ref = committed(checkpoints)[-1]
    paths = [lora.files.path / "checkpoints" / ref.name / entry.path for entry in ref.manifest.files]
    headers = [8 + int.from_bytes(path.read_bytes()[:8], "little") for path in paths]
    trained = sum(entry.numel for entry in ref.manifest.parameters)
    size = sum(path.stat().st_size for path in paths)
    base = sum(path.stat().st_size for path in lora.base.glob("*.safetensors"))
    print(
        f"{size:,} bytes in {len(paths)} files = {trained:,} trained parameters × {BYTES_PER_PARAMETER} + "
        f"{sum(headers):,} of headers; the base's weights are {base:,} bytes and not in it"
    )
    assert all(".lora_" in entry.name for entry in ref.manifest.parameters)
    assert size == trained * BYTES_PER_PARAMETER + sum(headers)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_base_is_refused_before_workers_start(lora: LoraRun, name: str) -> None:
    before = lora.attempts()
    with lora.changed(name):
        again = lora.finetune("training.steps=4")
        exported = run_here(export.main, "--config", str(lora.config))
    assert again.code == 2 and lora.attempts() == before, again.output
    assert "model.base: was " in again.output and f"({name} has other contents)" in again.output
    assert "Give the old values to continue it" in again.output and "resume.allow=[model.base]" in again.output
    assert exported.code == 2 and "was trained on the base" in exported.output


def test_a_new_run_may_begin_with_the_adapter_on_the_same_base_only(lora: LoraRun) -> None:
    heir, before = ("run.name=heir", f"init_from={lora.files.path}@2", "training.steps=1"), lora.attempts()
    with lora.changed("model.safetensors"):
        refused = lora.finetune(*heir)
        assert refused.code == 2 and lora.attempts() == before, refused.output
        assert "was trained from the base" in refused.output and "resume.allow=[model.base]" in refused.output
        meant = lora.finetune(*heir, "resume.allow=[model.base]", "--dry-run")
        assert meant.code == 0 and "nothing was started" in meant.output, meant.output
    assert lora.finetune(*heir, "--dry-run").code == 0


def test_an_adapter_that_was_pruned_meanwhile_is_named(lora: LoraRun) -> None:
    """A run that was begun from it, and has saved nothing yet."""
    folder, source = lora.files.path.parent / "late", f"{lora.files.path}@2"
    record = json.loads((lora.files.path / "run.json").read_text())
    record["config"]["init_from"] = source
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(record | {"init_from": f"{lora.files.path}/checkpoints/pruned"}))
    late = lora.finetune("run.name=late", f"init_from={source}", "--dry-run")
    assert late.code == 2 and "checkpoints/pruned is not there any more" in late.output, late.output


def test_the_checkpoints_own_base_counts(lora: LoraRun) -> None:
    """The record may have been changed on purpose, and the run killed before it saved on the new base."""
    record, before = lora.files.path / "run.json", lora.attempts()
    original = record.read_text()
    was = json.loads(original)["base"]
    with lora.changed("model.safetensors"):
        now = base_identity(ModelConfig(base=str(lora.base)), lora.base, Storage.at(lora.files.path / "notes")).name
        record.write_text(original.replace(was, now))
        again = lora.finetune("training.steps=4")
        record.write_text(original)
    assert again.code == 2 and lora.attempts() == before, again.output
    assert f"was trained from the base {was}, and model.base is {now}" in again.output


def test_the_same_bytes_written_again_are_the_same_base(lora: LoraRun) -> None:
    path = lora.base / "model.safetensors"
    path.write_bytes(path.read_bytes())
    again = lora.finetune("training.steps=3", "--dry-run")
    assert again.code == 0 and "nothing was started" in again.output, again.output
