"""A checkpoint to files that plain transformers and peft load, in bounded memory, going on where it was killed.

Tensors are read, converted and written by ranges (``trainer/export_plan.py``); what is finished is kept
(``trainer/export_writer.py``). The target counts as an export once its ``config.json`` (or ``adapter_config.json``) is
there: it is written last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from data_shards.errors import BadInput
from data_shards.storage import Storage, sha256
from trainer.base_loader import renames_tensors, skeleton
from trainer.base_tensors import BaseTensors
from trainer.base_weights import model_files
from trainer.checkpoint import CheckpointRef, SliceReader
from trainer.checkpoint_manifest import MANIFEST, ParameterEntry
from trainer.config import LoraConfig, ModelConfig
from trainer.export_plan import MAX_FILE_BYTES, ExportKind, ExportPlan, PlannedFile, index_file, plan_files
from trainer.export_writer import Contents, check_room, write_export
from trainer.model import build_model, model_config, peft_config
from trainer.tensor_files import TensorSpec

ADAPTER_FILE = "adapter_model.safetensors"
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja",
               "generation_config.json", "*.model", "preprocessor_config.json")  # fmt: skip

Report = Callable[[str], None]


@dataclass(frozen=True)
class ExportSource:
    """What to export: a checkpoint and the base that it was trained from."""

    checkpoints: Storage
    ref: CheckpointRef
    base: Path
    model: ModelConfig
    chat_template: str | None = None
    """text that replaced the tokenizer's own, if any"""

    def reader(self) -> SliceReader:
        return SliceReader(self.checkpoints.child(self.ref.name), self.ref)

    @property
    def parameters(self) -> dict[str, ParameterEntry]:
        return {entry.name: entry for entry in self.ref.manifest.parameters}


def export_full(
    source: ExportSource,
    target: Storage,
    dtype: torch.dtype,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    report: Report = lambda line: None,
) -> None:
    """All weights of a full-parameter run as Hugging Face safetensors, and what the model has beside them from its
    base, as that holds it.

    Raises BadInput where the checkpoint's parameters are not all that such a model trains, or a local target has no
    room.
    """
    entries = source.parameters
    model = skeleton(model_config(source.base, source.model))
    _check_parameters(source, model)
    fixed = _read_untrained(source, model)
    depends = {"base": _base_mark(source)} if fixed and not source.model.random_init else {}
    with source.reader() as reader:

        def produce(name: str, start: int, stop: int) -> torch.Tensor:
            if name in fixed:
                return fixed[name].flatten()[start:stop]
            return reader.read(name, "fp32", entries[name].numel, start, stop).to(dtype)

        if renames_tensors(model):
            whole = {name: produce(name, 0, entry.numel).reshape(entry.shape) for name, entry in entries.items()}
            plan = _plan(source, ExportKind.MODEL, dtype, (), depends)
            _save_through_transformers(source, model, target, whole | fixed, dtype, plan, report)
            return
        specs = {name: TensorSpec(entry.shape, dtype) for name, entry in entries.items()}
        specs |= {name: TensorSpec(tuple(value.shape), value.dtype) for name, value in fixed.items()}
        files = plan_files(specs, max_file_bytes)
        plan = _plan(source, ExportKind.MODEL, dtype, files, depends)
        write_export(target, plan, produce, _companions(source) | index_file(files) | _config(source, dtype), report)


def export_adapter(
    source: ExportSource, lora: LoraConfig, target: Storage, *, report: Report = lambda line: None
) -> None:
    """A LoRA run's adapter in peft's format, in fp32. Raises BadInput where a local target has no room."""
    entries = {adapter_name(name): entry for name, entry in source.parameters.items()}
    specs = {name: TensorSpec(entry.shape, torch.float32) for name, entry in entries.items()}
    plan = _plan(source, ExportKind.ADAPTER, torch.float32, (PlannedFile(ADAPTER_FILE, specs),))
    config = peft_config(lora)
    config.base_model_name_or_path = source.model.base
    config.target_modules = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in entries})
    config.inference_mode = True
    with source.reader() as reader:

        def produce(name: str, start: int, stop: int) -> torch.Tensor:
            entry = entries[name]
            return reader.read(entry.name, "fp32", entry.numel, start, stop)

        write_export(target, plan, produce, _companions(source) | _saved(config.save_pretrained), report)


def export_merged(
    source: ExportSource,
    lora: LoraConfig,
    target: Storage,
    dtype: torch.dtype,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    report: Report = lambda line: None,
) -> None:
    """Base + adapter as one model: W + (alpha / rank) B A, summed in fp32 (Hu et al., arXiv 2106.09685).

    Raises BadInput where the base has no weights, or not those that were adapted, or a local target has no room.
    """
    if source.model.random_init:
        raise BadInput("export.merge_lora needs the base's weights, and model.random_init=true has none")
    entries = source.parameters
    base = BaseTensors(source.base)
    adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for name in entries}
    if missing := sorted(adapted - set(base.names())):
        raise BadInput(f"the base's files hold no tensor {missing[0]!r}, so the adapter can't be merged into them")
    files = plan_files({name: TensorSpec(base.shape(name), dtype) for name in base.names()}, max_file_bytes)
    depends = {"lora": {"alpha": lora.alpha, "rank": lora.rank}, "base": _base_mark(source)}
    plan = _plan(source, ExportKind.MERGED, dtype, files, depends)
    with source.reader() as reader:

        def factor(weight: str, which: str, rows: slice = slice(None)) -> torch.Tensor:
            """Rows of A, fp32 [rank, in], or of B, fp32 [out, rank]."""
            module = weight.removesuffix(".weight")
            entry = entries[f"base_model.model.{module}.lora_{which}.default.weight"]
            num_rows, columns = entry.shape
            start, stop, _ = rows.indices(num_rows)
            return reader.read(entry.name, "fp32", entry.numel, start * columns, stop * columns).reshape(-1, columns)

        whole_a = lru_cache(maxsize=1)(lambda name: factor(name, "A"))

        def produce(name: str, start: int, stop: int) -> torch.Tensor:
            weight = base.read(name, start, stop)
            if name in adapted:
                columns = base.shape(name)[-1]
                update = factor(name, "B", slice(start // columns, stop // columns)) @ whole_a(name)  # [rows, in]
                weight = update.mul_(lora.alpha / lora.rank).reshape(-1).add_(weight)
            return weight.to(dtype)

        write_export(target, plan, produce, _companions(source) | index_file(files) | _config(source, dtype), report)


def untrained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model's files hold beside what full-parameter training moves: buffers, and parameters that are frozen.
    No checkpoint holds them."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) not in trained}


def depends_on_base(base: Path, config: ModelConfig) -> bool:
    """Whether all weights of a full-parameter run are not all of its model."""
    return bool(untrained_tensors(skeleton(model_config(base, config))))


def adapter_name(name: str) -> str:
    """The name of an adapter's parameter in peft's files."""
    return name.replace(".default.", ".")


def _check_parameters(source: ExportSource, model: torch.nn.Module) -> None:
    wanted = {name: tuple(value.shape) for name, value in model.named_parameters() if value.requires_grad}
    stored = {name: entry.shape for name, entry in source.parameters.items()}
    if wanted != stored:
        different = sorted(wanted.items() ^ stored.items())[:4]
        raise BadInput(
            f"checkpoint {source.ref.name} holds other parameters than a {type(model).__name__} of "
            f"model.base={str(source.base)!r} trains: {different}. Give the base that it was trained on"
        )


def _read_untrained(source: ExportSource, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As the base's files hold them, whole: they are small. Where its files name them otherwise, or it has none
    (model.random_init), as they are in the model that training begins with, which then must fit into memory."""
    wanted = untrained_tensors(model)
    if not wanted:
        return {}
    found = {}
    if not source.model.random_init:
        base = BaseTensors(source.base)
        shapes = {name: base.shape(name) for name in base.names()}
        same = [name for name, value in wanted.items() if shapes.get(name) == tuple(value.shape)]
        found = {name: base.read(name, 0, wanted[name].numel()).reshape(shapes[name]) for name in same}
    if wanted.keys() != found.keys():
        whole = build_model(source.base, source.model, None, seed=0).state_dict()
        found |= {name: whole[name].clone() for name in wanted if name not in found}
    return {name: found[name] for name in wanted}


def _plan(
    source: ExportSource,
    kind: ExportKind,
    dtype: torch.dtype,
    files: tuple[PlannedFile, ...],
    depends: Mapping[str, Any] | None = None,
) -> ExportPlan:
    """``depends``: what else the weights depend on."""
    request = {
        "checkpoint": source.ref.name,
        "checkpoint_sha256": sha256(source.checkpoints.child(source.ref.name).read(MANIFEST)),  # of any version
        "kind": kind.value,
        "dtype": str(dtype).removeprefix("torch."),
        "files": [file.to_json() for file in files],
        **(depends or {}),
    }
    return ExportPlan(kind, request, files)


def _base_mark(source: ExportSource) -> list[list[str | int]]:
    """Tells a base's files from others without reading them: a wrong alarm costs writing anew, nothing else."""
    stats = [(path.name, path.stat()) for path in model_files(source.base)]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]


def _save_through_transformers(
    source: ExportSource,
    model: Any,
    target: Storage,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype,
    plan: ExportPlan,
    report: Report,
) -> None:
    """For architectures whose files differ from their modules: needs memory, and a temporary folder, for the whole
    model, and begins anew after a kill."""
    model.to(dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    with tempfile.TemporaryDirectory() as folder:
        check_room(Path(folder), sum(tensor.nbytes for tensor in state.values()))
        model.save_pretrained(folder, max_shard_size=MAX_FILE_BYTES)
        files: Contents = {path.name: path for path in Path(folder).iterdir()}
        config = (Path(folder) / ExportKind.MODEL.mark).read_bytes()

        def none(name: str, start: int, stop: int) -> torch.Tensor:
            raise AssertionError("no file of this plan is made of tensors")

        write_export(target, plan, none, {**files, **_companions(source), ExportKind.MODEL.mark: config}, report)


def _companions(source: ExportSource) -> dict[str, bytes]:
    """Tokenizer, template and generation settings, byte for byte as the base has them."""
    found = {path.name: path for pattern in _COMPANIONS for path in source.base.glob(pattern) if path.is_file()}
    contents = {name: path.read_bytes() for name, path in found.items()}
    if source.chat_template is not None:
        contents["chat_template.jinja"] = source.chat_template.encode()
    return contents


def _config(source: ExportSource, dtype: torch.dtype) -> dict[str, bytes]:
    config = model_config(source.base, source.model)
    config.dtype = dtype
    config.architectures = config.architectures or [type(skeleton(config)).__name__]
    config.use_cache = True
    return _saved(config.save_pretrained)


def _saved(save_pretrained: Callable[[str], Any]) -> dict[str, bytes]:
    """The files that a ``save_pretrained`` writes, small ones."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
