"""Configuration: what is wrong is named with its key, its value and what would be right."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from data_shards.errors import BadInput
from launch.compatibility import differences, refused
from launch.config import load_config, resolve_paths
from launch.config_schema import PATH, schema_text

MINIMAL = {"model": {"base": "org/model"}, "data": {"train": "x.jsonl"}, "training": {"steps": 3}}


def write(folder: Path, values: object) -> str:
    path = folder / "my-run.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return str(path)


def test_defaults_and_overrides(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), ["optimizer.lr=1e-5", "training.lora.rank=4", "resume.allow=[a,b]"])
    assert config.run.name == "my-run"
    assert config.optimizer.lr == 1e-5 and config.training.lora.rank == 4 and config.resume.allow == ("a", "b")
    assert load_config(write(tmp_path, MINIMAL), ["run.name=other"]).run.name == "other"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", r"optimizer\.learning_rate: unknown key \(value 1\)"),
        ("optimizer.weight_deca=1", r"did you mean weight_decay"),
        ("hub_token=hf_12", r"hub_token: unknown key \(value a secret, perhaps, not shown\)"),
        ("cluster.notice_file=leaving", r"cluster: .*notice_file='leaving' must begin with /"),
        ("cluster={launcher: processes, notice_port: 1}", r"cluster: .*notice_port is for launcher=ray"),
        ("lr=1e-5", r"lr: unknown key.*did you mean.*optimizer\.lr"),
        ("training.global_batch=lots", r"training\.global_batch: .*integer.*'lots'"),
        ("training.epochs=1", r"exactly one of training\.steps and training\.epochs"),
        ("model.precision=fp8", r"model\.precision: .*'bf16' or 'fp32'.*'fp8'"),
        ("data.validation_fraction=1.5", r"data\.validation_fraction: .*less than 1.*1\.5"),
        ("optimizer.lr", r"an override reads section\.key=value"),
        ("optimizer.lr.x=1", r"lr is a value, not a section"),
        ("run.name=a/b", r"run\.name"),
        ("optimizer.max_grad_norm=.inf", r"optimizer\.max_grad_norm: .*finite"),
        ("zero.offload_optimizer=cpu", r"zero\.offload_optimizer: unknown key"),
        ("optimizer.lr=[", r"not valid YAML"),
        (
            "checkpoint.commit_timeout_s=900",
            r"=900 is too long.*collective_timeout_s=1800.*Lower the one",
        ),
    ],
)
def test_bad_values_are_explained(tmp_path: Path, override: str, message: str) -> None:
    values = MINIMAL | {"optimizer": {"lr": 1e-4}}
    with pytest.raises(BadInput, match=message):
        load_config(write(tmp_path, values), [override])


@pytest.mark.parametrize(("seq_len", "tokens"), [(2048, 4_000_000), (131_072, 128 * 131_072)])
def test_a_shard_holds_enough_packs_to_be_full(tmp_path: Path, seq_len: int, tokens: int) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_config(path, [f"data.seq_len={seq_len}"]).data.shard_tokens == tokens
    assert load_config(path, [f"data.seq_len={seq_len}", "data.max_shard_tokens=7"]).data.shard_tokens == 7


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    """PyYAML alone reads 1e-6 as text; where the field is free that would reach the model."""
    path = write(
        tmp_path,
        "model: {base: x, config_overrides: {eps: 1e-6, theta: 5E+5, name: 1e-6x, version: '1e3'}}\n"
        "data: {train: x}\ntraining: {steps: 1}",
    )
    config = load_config(path, ["model.config_overrides.other=2e-5"])
    expected = {"eps": 1e-6, "theta": 5e5, "name": "1e-6x", "version": "1e3", "other": 2e-5}
    assert config.model.config_overrides == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {base: x", "not valid YAML"),
        ("- a\n- b", "expected sections"),
        ("model: {base: x}\ntraining: {steps: 1}", "data: is required and missing"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_config(write(tmp_path, text))
    with pytest.raises(BadInput, match="No such file"):
        load_config(str(tmp_path / "absent.yaml"))


def test_paths_are_resolved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve_paths(load_config(write(tmp_path, MINIMAL)), in_ray_job=False)
    assert config.data.train[0].path == str(tmp_path / "x.jsonl")
    assert config.run.storage == str(tmp_path / "runs")
    assert config.model.base == "org/model", "a hub id stays"
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert resolve_paths(load_config(write(tmp_path, MINIMAL)), in_ray_job=False).model.base == str(
        tmp_path / "org/model"
    )


def test_relative_storage_under_a_job_is_refused(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(BadInput, match=r"run\.storage='runs' is relative.*thrown away"):
        resolve_paths(config, in_ray_job=True)
    for storage in ("/shared/runs", "s3://bucket/runs"):
        kept = load_config(write(tmp_path, MINIMAL), [f"run.storage={storage}"])
        assert resolve_paths(kept, in_ray_job=True).run.storage == storage


def test_schema_is_in_step_and_accepts_our_presets() -> None:
    assert PATH.read_text() == schema_text(), "run `make schema` and commit launch/config_schema.json"
    presets = sorted(PATH.parent.glob("configs/*.yaml"))
    assert presets
    for preset in presets:
        jsonschema.validate(yaml.safe_load(preset.read_text()), json.loads(schema_text()))
        load_config(str(preset))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(MINIMAL | {"optimiser": {}}, json.loads(schema_text()))


def record(tmp_path: Path, *overrides: str, fingerprint: str = "f", base: str = "b") -> dict[str, object]:
    config = load_config(write(tmp_path, MINIMAL), overrides).model_dump(mode="json")
    return {"config": config, "base": base, "data": {"fingerprint": fingerprint}}


@pytest.mark.parametrize(
    "free",
    [
        "training.steps=9",
        "training.micro_batch=4",
        "cluster.num_workers=8",
        "evaluation.every_steps=5",
        "checkpoint.keep_last=9",
        "data.train=moved.jsonl",
        "run.storage=/else",
    ],
)
def test_free_changes_continue_a_run(tmp_path: Path, free: str) -> None:
    assert differences(record(tmp_path), record(tmp_path, free)) == []


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("optimizer.lr=1", "optimizer.lr"),
        ("training.global_batch=2", "training.global_batch"),
        ("seed=4", "seed"),
        ("training.method=lora", "training.method"),
        ("model.precision=fp32", "model.precision"),
        ("training.lora.rank=3", "training.lora.rank"),
    ],
)
def test_changes_that_matter_are_listed(tmp_path: Path, change: str, key: str) -> None:
    found = differences(record(tmp_path), record(tmp_path, change))
    assert [d.key for d in found] == [key]
    assert refused(found, [key]) == [] and refused(found, [key.split(".")[0]]) == []
    assert refused(found, [key + "x"]) == found


def test_changed_data_and_base_are_listed(tmp_path: Path) -> None:
    found = differences(record(tmp_path), record(tmp_path, fingerprint="g", base="c"))
    assert [str(d) for d in found] == ["model.base: was 'b', now 'c'", "data.fingerprint: was 'f', now 'g'"]
