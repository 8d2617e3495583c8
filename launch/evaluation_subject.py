"""What ``baton evaluate`` looks at: a checkpoint of the run, its base, or a folder that something was exported to."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_shards.encoding.encoder import load_tokenizer, tokenizer_identity
from data_shards.errors import BadInput
from data_shards.manifest import DatasetManifest
from launch.config import Config
from launch.places import at_commit, check_trained_on, newest_checkpoint, open_run, recorded_settings
from trainer.base_location import check_base_directory
from trainer.config import LoraConfig, Method, ModelConfig, TrainerConfig
from trainer.export import ADAPTER_FILE
from trainer.model import model_config
from trainer.run_directory import read_json

_PLAIN_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""What of a peft configuration ``training.lora`` can say; anything else in these fields changes the model."""


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, with everything that says what it computes."""

    title: str
    file_stem: str
    """of the result's file, after the split"""
    trainer: TrainerConfig
    place: Path
    """the directory whose config.json the model is built from"""
    init_from: str | None = None
    """URI of a checkpoint"""
    adapter: str | None = None
    about: dict[str, Any] = field(default_factory=dict)


def base_subject(config: Config, base: Path) -> Subject:
    trainer = _with(config.trainer(), Method.FULL, config.training.lora, at_commit(config.model, base))
    return Subject(f"base {config.model.base}", "base", trainer, base, about={"model": config.model.base})


def checkpoint_subject(config: Config, base: Path, step: int | None) -> Subject:
    """The model as the checkpoint's own recorded configuration describes it; only where the base lies, and how it is
    computed, come from the configuration at hand.

    Raises BadInput where there is no such checkpoint, or it was trained from another base.
    """
    run = open_run(config)
    ref = newest_checkpoint(run, step)
    was = recorded_settings(config, ref)
    check_trained_on(config, was, base, ref)
    trainer = _with(config.trainer(), was.training.method, was.training.lora, at_commit(was.model, base))
    uri = run.checkpoints.uri_of(ref.name)
    return Subject(
        f"step {ref.step} of {config.run.name}",
        f"step-{ref.step:08d}",
        trainer.model_copy(update={"seed": was.seed}),
        base,
        init_from=uri,
        about={"model": uri, "step": ref.step, "base": ref.manifest.base},
    )


def folder_subject(config: Config, base: Path, folder: Path) -> Subject:
    """An exported model, or a peft adapter beside the configuration's base. Raises BadInput where it is neither."""
    stem = f"model-{hashlib.sha256(str(folder).encode()).hexdigest()[:12]}"
    about = {"model": str(folder)}
    if (folder / "adapter_config.json").is_file():
        lora = _adapter_lora(folder)
        trainer = _with(config.trainer(), Method.LORA, lora, at_commit(config.model, base))
        return Subject(
            f"adapter {folder}", stem, trainer, base, adapter=str(folder), about=about | {"base": config.model.base}
        )
    check_base_directory(folder, needs_weights=True)
    # Its own config.json says everything; our changes to the base's are in it already.
    update: dict[str, Any] = {"base": str(folder), "revision": None, "random_init": False, "config_overrides": {}}
    model = config.model.model_copy(update=update)
    trainer = _with(config.trainer(), Method.FULL, config.training.lora, model)
    return Subject(f"model {folder}", stem, trainer, folder, about=about)


def check_data_fits(subject: Subject, config: Config, manifest: DatasetManifest, largest_id: int) -> None:
    """Raises BadInput where the split's token ids are not the model's, by its vocabulary or by its tokenizer."""
    vocabulary = model_config(subject.place, subject.trainer.model).vocab_size
    if largest_id >= vocabulary:
        raise BadInput(
            f"the data holds token id {largest_id}, and {subject.title} knows {vocabulary} tokens: the data was "
            "prepared with another tokenizer. Give the configuration of the model's own base (model.base)"
        )
    ours = manifest.identity["encoding"]["tokenizer"]
    theirs = _tokenizer_of(subject, config)
    if theirs is not None and theirs != ours:
        raise BadInput(
            f"the data ({manifest.fingerprint}) was prepared with the tokenizer of model.base={config.model.base!r}, "
            f"and {subject.title} was trained with another: the ids would mean other words. Give its own model.base"
        )


def other_data(config: Config, manifest: DatasetManifest) -> bool:
    """Whether the data at hand is not what the run was trained on, as far as that was recorded."""
    recorded = read_json(open_run(config).storage, "run.json")
    return recorded is not None and recorded["data"]["fingerprint"] != manifest.fingerprint


def _with(trainer: TrainerConfig, method: Method, lora: LoraConfig, model: ModelConfig) -> TrainerConfig:
    training = trainer.training.model_copy(update={"method": method, "lora": lora})
    # Nothing is recomputed where there is no backward.
    model = model.model_copy(update={"activation_checkpointing": False})
    return trainer.model_copy(update={"training": training, "model": model})


def _adapter_lora(folder: Path) -> LoraConfig:
    values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    odd = {key: values[key] for key, plain in _PLAIN_LORA.items() if (values.get(key) or plain) != plain}
    if odd or not (folder / ADAPTER_FILE).is_file():
        problem = f"asks for {odd}" if odd else f"has no {ADAPTER_FILE}"
        raise BadInput(f"--model {folder}: this adapter {problem}; merge it with peft and give the merged model")
    targets = values["target_modules"]
    return LoraConfig(
        rank=values["r"],
        alpha=values["lora_alpha"],
        target_modules=targets if isinstance(targets, str) else tuple(sorted(targets)),
    )


def _tokenizer_of(subject: Subject, config: Config) -> str | None:
    """The tokenizer that the model was trained with; None where nothing tells."""
    if subject.init_from is not None:
        recorded = read_json(open_run(config).storage, "run.json")
        return str(recorded["data"]["encoding"]["tokenizer"]) if recorded else None
    if subject.adapter is None and (subject.place / "tokenizer.json").is_file():
        return tokenizer_identity(load_tokenizer(subject.place))
    return None
