"""`baton plan`: exact shapes without weights, a verdict, advice that holds, and every preset passing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from data_shards.errors import BadInput
from launch import finetune, plan, prepare
from launch.architectures import PUBLISHED
from launch.cli import run_verb
from launch.config import load_config, resolve_paths
from launch.plan_inputs import Origin, find_hf_config, find_target, look_at_data
from launch.quickstart_inputs import make_base, records, write_jsonl
from tests.support.tiny import save_tiny_model
from trainer.activation_memory import Device
from trainer.config import Attention, LoraConfig, Method, OptimizerName, Precision, ZeroConfig
from trainer.disk_plan import checkpoint_bytes, export_bytes
from trainer.errors import ModelError
from trainer.memory_plan import GIB, Moment, Workload, largest_sub_group, memory_plan, rank_state
from trainer.model_shape import ModelShape, ParameterShape, count, model_shape

PRESETS = sorted((Path(__file__).resolve().parents[2] / "launch" / "configs").glob("*.yaml"))
BIG = [path for path in PRESETS if path.stem not in ("quickstart", "gsm8k-tiny")]
LLAMA_8B, LLAMA_70B, QWEN_7B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B", "Qwen/Qwen2.5-7B"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write(folder: Path, values: dict[str, Any], name: str = "run") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def big_model(base: str, **sections: Any) -> dict[str, Any]:
    values = {
        "model": {"base": base},
        "data": {"train": "x.jsonl"},
        "training": {"steps": 3},
        "run": {"storage": "s3://bucket/runs"},
    }
    return values | sections


def shape_of(tmp_path: Path, base: str, method: Method, **lora: Any) -> ModelShape:
    hf_config, _ = find_hf_config(load_config(write(tmp_path, big_model(base))))
    return model_shape(hf_config, Precision.BF16, method, LoraConfig(**lora))


def run_plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run_verb(plan.main, list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(
    ("base", "parameters"), [(LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496), (QWEN_7B, 7_615_616_512)]
)
def test_known_architectures_have_their_published_size(tmp_path: Path, base: str, parameters: int) -> None:
    shape = shape_of(tmp_path, base, Method.LORA, rank=16)
    assert count(shape.base) == parameters
    w = shape.widths
    linears = [(w.hidden, w.attention), (w.hidden, w.key), (w.hidden, w.key), (w.attention, w.hidden)]
    linears += [(w.hidden, w.ffn), (w.hidden, w.ffn), (w.ffn, w.hidden)]
    assert count(shape.trained) == w.layers * sum(16 * (inputs + outputs) for inputs, outputs in linears)
    assert {p.itemsize for p in shape.trained} == {4} and {p.itemsize for p in shape.base} == {2}
    assert all(not p.trained for p in shape.base)


def test_the_fewest_workers_must_fit_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def planned(**cluster: Any) -> tuple[int, str]:
        values = big_model(LLAMA_8B, training={"steps": 3, "micro_batch": 1}, cluster=cluster)
        values["model"] = {"base": LLAMA_8B, "activation_checkpointing": True}
        code, _, err = run_plan(capsys, "--config", write(tmp_path, values), "--gpu-memory-gib", "40")
        return code, err

    assert planned(num_workers=64)[0] == 0 and planned(num_workers=2)[0] == 2
    code, err = planned(workers={"min": 2, "max": 64})
    assert code == 2 and "with cluster.workers.min=2: a worker needs" in err
    assert planned(workers={"min": 32, "max": 64})[0] == 0


def test_every_known_architecture_can_be_built(tmp_path: Path) -> None:
    for base in PUBLISHED:
        assert shape_of(tmp_path, base, Method.FULL).num_parameters > 7e9


def test_config_overrides_and_ties_count(tmp_path: Path) -> None:
    base = str(save_tiny_model(tmp_path / "base", tied=True))
    values = big_model(base) | {"model": {"base": base, "config_overrides": {"num_hidden_layers": 1}}}
    hf_config, source = find_hf_config(load_config(write(tmp_path, values)))
    shape = model_shape(hf_config, Precision.FP32, Method.FULL, LoraConfig())
    names = [p.name for p in shape.parameters]
    assert "lm_head.weight" not in names and not any(".layers.1." in name for name in names)
    (head,) = (module for module in shape.modules if module.name == "lm_head")
    assert head.parameters[0].name == "model.embed_tokens.weight", "a tied head runs with the embedding's parameter"
    assert source.endswith("config.json")


def test_unknown_bases_are_refused_with_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.base='org/unheard'.*config\.json.*meta-llama/Llama-3\.1-8B"):
        find_hf_config(load_config(write(tmp_path, big_model("org/unheard"))))


@pytest.mark.parametrize("preset", BIG, ids=lambda path: path.stem)
def test_presets_fit_their_hardware(capsys: pytest.CaptureFixture[str], preset: Path) -> None:
    code, out, err = run_plan(capsys, "--config", str(preset), "run.storage=s3://bucket/runs", "--json")
    assert code == 0, err
    report = json.loads(out)
    memory = report["memory"]
    assert report["fits"] and memory["device"] == "gpu" and memory["available_source"] == "cluster.gpu_memory_gib"
    worst = memory["moments"][memory["worst_moment"]]
    parts = sum(memory["held"].values()) + sum(worst.values())
    assert memory["required_bytes"] == parts + memory["runtime_allowance"] + memory["allocator_allowance"]
    geometry = report["geometry"]
    assert geometry["packs_per_rank"] == [geometry["global_batch"] // geometry["workers"]] * 2, "no idle places"


def test_there_is_a_preset_for_each_promised_run() -> None:
    assert {path.stem for path in PRESETS} >= {
        "gsm8k-tiny", "llama3-8b-full", "llama3-8b-lora", "llama3-70b-lora", "llama3-70b-full", "qwen2.5-7b-lora",
    }  # fmt: skip


def test_presets_for_cpu_fit_with_a_small_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save_tiny_model(tmp_path / "base", max_position_embeddings=1024)
    for preset in PRESETS:
        if preset in BIG:
            continue
        code, out, err = run_plan(
            capsys, "--config", str(preset), f"model.base={base}", f"run.storage={tmp_path}", "cluster.use_gpu=false"
        )
        assert code == 0, err
        assert "memory of one worker" in out and "CPU workers" in out


def test_what_does_not_fit_ends_with_2_and_advice_that_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = big_model(
        LLAMA_8B,
        model={"base": LLAMA_8B, "config_overrides": {"num_hidden_layers": 4}},
        data={"train": "x.jsonl", "seq_len": 8192, "validation_fraction": 0.1},
        training={"steps": 3, "micro_batch": 4},
        cluster={"num_workers": 8},
    )
    common = ["--config", write(tmp_path, values), "--gpu-memory-gib", "26"]
    code, out, err = run_plan(capsys, *common, "--json")
    assert code == 2
    assert "the run does not fit: a worker needs" in err and "--gpu-memory-gib" in err
    remedies = json.loads(out)["remedies"]
    changes = [remedy["change"] for remedy in remedies]
    assert "model.activation_checkpointing=true" in changes and "training.micro_batch=1" in changes
    assert "cluster.num_workers=1024" in changes and "training.method=lora" in changes
    assert any(remedy["fits"] for remedy in remedies)
    for remedy in remedies:
        code, out, _ = run_plan(capsys, *common, *remedy["change"].split(), "--json")
        assert json.loads(out)["memory"]["required_bytes"] == remedy["required_bytes"], remedy["change"]
        assert (code == 0) == remedy["fits"], remedy["change"]


def test_too_little_disk_is_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = big_model(LLAMA_70B, run={"storage": str(tmp_path / "not" / "yet")}, checkpoint={"keep_last": 1000})
    code, out, err = run_plan(
        capsys, "--config", write(tmp_path, values), "cluster.num_workers=64", "--gpu-memory-gib=900"
    )
    assert code == 2 and "DOES NOT FIT" in out
    assert "run.storage needs" in err and "checkpoint.keep_last" in err and "a worker needs" not in err


def test_where_a_worker_runs_is_said_or_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    values = big_model(LLAMA_8B, cluster={"num_workers": 16, "gpu_memory_gib": 70})
    config = load_config(write(tmp_path, values))
    assert find_target(config).memory_bytes == 70 * GIB and find_target(config).workers_per_node == 8
    assert find_target(config, 24, 4) == replace(
        find_target(config), memory_bytes=24 * GIB, workers_per_node=4, source="--gpu-memory-gib"
    )
    unsaid = load_config(write(tmp_path, big_model(LLAMA_8B)), ["cluster.num_workers=2"])
    assert find_target(unsaid).device == Device.CPU and find_target(unsaid).assumed
    with pytest.raises(BadInput, match="--gpu-memory-gib"):
        find_target(load_config(write(tmp_path, big_model(LLAMA_8B)), ["cluster.use_gpu=true"]))


def test_mixed_precision_adam_takes_18_bytes_a_parameter() -> None:
    """2 for bf16 weights, 4 each for masters, gradients and two states (arXiv 1910.02054, section 3, with fp32
    gradients); ceil(n / W) elements of each parameter."""
    shapes = [ParameterShape("a", (7, 3), 2, True), ParameterShape("b", (5,), 2, True)]
    assert rank_state(shapes, 1, OptimizerName.ADAMW) == (26 * 2, 26 * 4, 26 * 4, 26 * 8)
    assert rank_state(shapes, 4, OptimizerName.ADAMW) == (8 * 2, 8 * 4, 8 * 4, 8 * 8)
    assert rank_state(shapes, 4, OptimizerName.SGD).optimizer == 0
    frozen = [replace(shape, trained=False) for shape in shapes]
    assert rank_state(frozen, 4, OptimizerName.ADAMW) == (16, 0, 0, 0)
    assert largest_sub_group(shapes, 1, 10**9) == 21, "matrices and vectors are groups of their own"
    assert largest_sub_group([shapes[0]] * 5, 1, 30) == 42


def test_what_makes_a_run_larger_makes_its_plan_larger(tmp_path: Path) -> None:
    """Each field matters to the figure, in the right direction."""
    small = Workload(
        shape=shape_of(tmp_path, QWEN_7B, Method.FULL),
        world_size=8,
        seq_len=2048,
        micro_batch=1,
        eval_micro_batch=1,
        attention=Attention.PACKED,
        activation_checkpointing=True,
        optimizer=OptimizerName.SGD,
        zero=ZeroConfig(max_live_parameters=10**8, sub_group_size=10**8, reduce_bucket_size=10**7),
        device=Device.GPU,
    )
    required = memory_plan(small).required_bytes
    for change in (
        {"world_size": 4},
        {"seq_len": 4096},
        {"micro_batch": 2},
        {"eval_micro_batch": 32},
        {"activation_checkpointing": False},
        {"optimizer": OptimizerName.ADAMW},
        {"zero": small.zero.model_copy(update={"max_live_parameters": 10**9})},
        {"zero": small.zero.model_copy(update={"reduce_bucket_size": 10**8})},
    ):
        assert memory_plan(replace(small, **change)).required_bytes > required, change
    update = memory_plan(small).moments[Moment.UPDATE]
    larger = memory_plan(replace(small, zero=small.zero.model_copy(update={"sub_group_size": 10**9})))
    assert sum(larger.moments[Moment.UPDATE].values()) > sum(update.values())
    quadratic = replace(small, attention=Attention.EAGER, activation_checkpointing=False)
    linear = replace(small, activation_checkpointing=False)
    assert memory_plan(quadratic).required_bytes > 1.5 * memory_plan(linear).required_bytes


def test_files_are_counted(tmp_path: Path) -> None:
    adapted = shape_of(tmp_path, LLAMA_8B, Method.LORA, rank=8)
    trained = count(adapted.trained)
    assert export_bytes(adapted, 2, merge_lora=True) == {"adapter": trained * 4, "merged": 8_030_261_248 * 2}
    one, many = (checkpoint_bytes(adapted.trained, workers, ("exp_avg", "exp_avg_sq")) for workers in (1, 64))
    assert trained * 12 < one < many < trained * 12 * 1.1, "slices are stored without padding; headers add a little"


@pytest.fixture
def small_run(tmp_path: Path) -> str:
    rows = records(300, seed=1)
    write_jsonl(tmp_path / "train.jsonl", rows)
    make_base(tmp_path / "base", [f"{row['question']} {row['answer']}" for row in rows])
    return write(
        tmp_path,
        {
            "model": {"base": str(tmp_path / "base"), "precision": "fp32"},
            "data": {"train": str(tmp_path / "train.jsonl"), "seq_len": 256, "validation_fraction": 0.2},
            "training": {"global_batch": 5, "micro_batch": 2, "epochs": 2},
            "cluster": {"launcher": "processes", "num_workers": 2, "use_gpu": False},
            "run": {"storage": str(tmp_path / "runs")},
        },
    )


def test_data_is_estimated_then_known(small_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    guess = look_at_data(resolve_paths(load_config(small_run), in_ray_job=False))
    assert guess.origin == Origin.ESTIMATED
    assert run_verb(prepare.main, ["--config", small_run]) == 0
    capsys.readouterr()
    code, out, err = run_plan(capsys, "--config", small_run, "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["data"]["origin"] == "prepared" and report["data"]["bytes"] > 0
    assert guess.packs == pytest.approx(report["data"]["packs"], rel=0.15)
    assert guess.tokens == pytest.approx(report["data"]["tokens"], rel=0.15)
    assert report["steps"] == -(-2 * report["data"]["packs"] // 5)
    code, out, _ = run_plan(capsys, "--config", small_run)
    assert f"{report['data']['packs']:,} packs" in out and "38% of the micro batches' places stay empty" in out
    assert run_verb(finetune.main, ["--config", small_run, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert out.split("memory of one worker")[1].split("disk")[0] in dry, "a dry run shows the same plan"
    assert not list(Path(small_run).parent.glob("runs/run/checkpoints/*"))


def test_missing_data_leaves_the_rest_of_the_plan(small_run: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run_plan(capsys, "--config", small_run, "data.train=/absent.jsonl", "--json")
    report = json.loads(out)
    assert code == 0 and report["data"]["origin"] == "unknown" and "/absent.jsonl" in report["data"]["note"]
    assert report["steps"] is None and report["memory"]["required_bytes"] > 0


JOB: Any = SimpleNamespace(config=None)


def check_fits(monkeypatch: pytest.MonkeyPatch, *, assumed: bool, trained: bool, plan: Any) -> None:
    """With a plan that is not made, of a machine that may only be assumed."""
    monkeypatch.setattr(finetune, "find_target", lambda config: SimpleNamespace(assumed=assumed))
    monkeypatch.setattr(finetune, "make_plan", plan)
    standing: Any = SimpleNamespace(newest="a checkpoint" if trained else None)
    finetune.check_fits(JOB, standing)


def too_much(*_: Any) -> Any:
    return None, "a worker needs too much"


def unplannable(*_: Any) -> Any:
    raise ModelError("a plan needs num_attention_heads")


@pytest.mark.parametrize(
    ("assumed", "trained", "plan", "said"),
    [
        (False, True, too_much, "by its plan the run does not fit: a worker needs too much"),
        (False, False, unplannable, "whether the run fits is not known: a plan needs num_attention_heads"),
        (True, False, too_much, ""),
    ],
)
def test_finetune_only_tells_what_is_not_sure(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    assumed: bool,
    trained: bool,
    plan: Any,
    said: str,
) -> None:
    check_fits(monkeypatch, assumed=assumed, trained=trained, plan=plan)
    told = capsys.readouterr().out
    assert said in told and bool(told) == bool(said)


def test_finetune_refuses_a_new_run_that_surely_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="does not fit: a worker needs too much"):
        check_fits(monkeypatch, assumed=False, trained=False, plan=too_much)
