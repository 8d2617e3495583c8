"""The whole configuration of a run: one YAML file, dotted overrides, everything checked before anything starts."""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from cluster.config import ClusterConfig, MetricsConfig
from data_shards.config import ConfigModel, DataConfig, SourceConfig
from data_shards.credentials import may_be_secret, refuse_secrets
from data_shards.errors import BadInput
from trainer.config import TrainerConfig


class RunSection(ConfigModel):
    name: str = Field("", pattern=r"^[A-Za-z0-9._-]*$", description="Default: the configuration file's stem.")
    storage: str = Field("runs", description="Where runs live: a local or shared path, s3://… or gs://….")


class ResumeSection(ConfigModel):
    allow: tuple[str, ...] = Field((), description="Keys that may differ from the interrupted run, on purpose.")


class ExportSection(ConfigModel):
    at_end: bool = Field(False, description="Export the model when the last step is committed.")
    best: bool = Field(
        False, description="Of the checkpoint with the lowest evaluation loss at its own step, not of the newest."
    )
    dtype: Literal["bf16", "fp32", "fp16"] | None = Field(None, description="Default: model.precision.")
    merge_lora: bool = Field(False, description="Also write base + adapter as one model.")


class Config(TrainerConfig):
    run: RunSection = RunSection()
    data: DataConfig
    cluster: ClusterConfig = ClusterConfig()
    metrics: MetricsConfig = MetricsConfig()
    resume: ResumeSection = ResumeSection()
    export: ExportSection = ExportSection()
    init_from: str | None = Field(
        None, description="A run's folder, or folder@step: begin a new run with its weights (and a fresh optimizer)."
    )

    @model_validator(mode="after")
    def _merge_needs_a_base(self) -> Config:
        if self.export.merge_lora and self.model.random_init:
            raise ValueError("export.merge_lora needs the base's weights, and model.random_init=true has none")
        return self

    @model_validator(mode="after")
    def _what_needs_evaluations_has_some(self) -> Config:
        if self.evaluation.patience is not None and not self.data.holds_out:
            raise ValueError(
                f"evaluation.patience={self.evaluation.patience} needs held-out records: give data.validation, "
                "data.validation_fraction or data.split"
            )
        if self.export.best and not (self.checkpoint.keep_best and self.data.holds_out):
            raise ValueError(
                "export.best=true needs checkpoint.keep_best=1 or more, as the best checkpoint is removed otherwise, "
                "and held-out records (data.validation, data.validation_fraction or data.split)"
            )
        return self

    @model_validator(mode="after")
    def _saves_end_before_collectives_do(self) -> Config:
        longest = 2 * self.checkpoint.commit_timeout_s
        if longest >= self.cluster.collective_timeout_s:
            raise ValueError(
                f"checkpoint.commit_timeout_s={self.checkpoint.commit_timeout_s:g} is too long: workers wait up to "
                "twice as long for the last save, and cluster.collective_timeout_s="
                f"{self.cluster.collective_timeout_s:g} would end them. Lower the one or raise the other"
            )
        return self

    def trainer(self) -> TrainerConfig:
        return TrainerConfig.model_validate({name: getattr(self, name) for name in TrainerConfig.model_fields})


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate. Does no I/O but reading the file.

    Args:
        overrides: ``section.key=value``, the value in YAML.

    Raises:
        BadInput: every problem found, each with key, value and what would be right.
    """
    values = _read_yaml(path)
    for override in overrides:
        _apply_override(values, override)
    refuse_secrets(values)  # before anything can be printed
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        lines = "\n".join(f"  {_explain(problem)}" for problem in error.errors())
        raise BadInput(f"{path}: the configuration is not valid:\n{lines}") from None
    if config.run.name:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"name": Path(path).stem})})


class _Loader(yaml.SafeLoader):
    """Reads ``1e-6`` as a number, as YAML 1.2 and everybody does; to PyYAML (1.1) it is text without a dot."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)  # a SafeLoader


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"--config {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise BadInput(f"{path}: expected sections such as model: and data:, found {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise BadInput(f"{override!r}: an override reads section.key=value, such as optimizer.lr=1e-5")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise BadInput(f"{override!r}: the value is not valid YAML: {error}") from error
    *sections, leaf = key.split(".")
    target = values
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise BadInput(f"{override!r}: {section} is a value, not a section")
    target[leaf] = value


def _explain(problem: Any) -> str:
    key = ".".join(map(str, problem["loc"])) or "configuration"
    if problem["type"] == "extra_forbidden":
        *above, name = problem["loc"]
        known = _field_names(above)
        near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
        elsewhere = [f for f in _all_keys() if f.rpartition(".")[2] == str(name)]
        hint = " or ".join(near + elsewhere) or f"one of {', '.join(known)}"
        value = "a secret, perhaps, not shown" if may_be_secret(str(name)) else repr(problem["input"])
        return f"{key}: unknown key (value {value}); did you mean {hint}?"
    if problem["type"] == "missing":
        return f"{key}: is required and missing"
    return f"{key}: {problem['msg']} (value {problem['input']!r})"


def _model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(filter(None, map(_model_of, typing.get_args(annotation))), None)
    return None


def _field_names(path: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Config
    for name in path:
        inner = _model_of(model.model_fields[str(name)].annotation) if str(name) in model.model_fields else None
        if inner is None:
            return []
        model = inner
    return list(model.model_fields)


def _all_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = _model_of(field.annotation)
        keys += _all_keys(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return keys


def resolve_paths(config: Config, *, in_ray_job: bool) -> Config:
    """Make every local path absolute, once, here. Hub ids and URIs stay.

    Raises BadInput for a relative storage path under a Ray job, whose working folder is thrown away.
    """
    storage = config.run.storage
    if in_ray_job and not _is_uri(storage) and not Path(storage).is_absolute():
        raise BadInput(
            f"run.storage={storage!r} is relative, and a Ray job runs in a copy of the working directory that is "
            "thrown away with everything in it. Give an absolute path that all nodes share, or s3://… or gs://…"
        )
    data = config.data.model_copy(
        update={
            name: _absolute(value)
            for name in ("chat_template", "prepared")
            if (value := getattr(config.data, name)) is not None
        }
        | {name: tuple(map(_absolute_source, getattr(config.data, name))) for name in ("train", "validation", "test")}
    )
    base = config.model.base
    if Path(base).expanduser().is_dir() or base.startswith((".", "~")):
        base = _absolute(base)
    update: dict[str, Any] = {
        "data": data,
        "model": config.model.model_copy(update={"base": base}),
        "run": config.run.model_copy(update={"storage": _absolute(storage)}),
    }
    if config.init_from is not None:
        update["init_from"] = _absolute(config.init_from)
    return config.model_copy(update=update)


def _is_uri(path: str) -> bool:
    return "://" in path


def _absolute(path: str) -> str:
    return path if _is_uri(path) else os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - keeps links


def _absolute_source(source: SourceConfig) -> SourceConfig:
    template = source.chat_template and _absolute(source.chat_template)
    return source.model_copy(update={"path": _absolute(source.path), "chat_template": template})


def to_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
