"""A checkpoint to files that plain transformers and peft load, one tensor in memory at a time.

The target counts as an export once its ``config.json`` (or ``adapter_config.json``) is there: it is written last.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_shards.errors import BadInput
from data_shards.storage import Storage
from trainer.checkpoint import CheckpointRef, SliceReader
from trainer.config import LoraConfig, ModelConfig
from trainer.model import model_config, peft_config, weight_files
from trainer.tensor_files import TensorSpec, write_tensors

MAX_FILE_BYTES = 5_000_000_000
ADAPTER_FILE = "adapter_model.safetensors"
_COMPANIONS = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.jinja",
               "generation_config.json", "*.model", "preprocessor_config.json")  # fmt: skip

Produce = Callable[[str], torch.Tensor]


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


def export_full(source: ExportSource, target: Storage, dtype: torch.dtype) -> None:
    """All weights of a full-parameter run as Hugging Face safetensors.

    Raises BadInput for an architecture whose files name tensors otherwise than its modules do and that is too new to
    be written by ``save_pretrained`` here.
    """
    shapes = {entry.name: entry for entry in source.ref.manifest.parameters}
    skeleton = _skeleton(source)
    with source.reader() as reader:

        def produce(name: str) -> torch.Tensor:
            entry = shapes[name]
            return reader.read(name, "fp32", entry.numel, 0, entry.numel).reshape(entry.shape).to(dtype)

        if _renames_tensors(skeleton):
            _save_through_transformers(source, skeleton, target, produce, dtype)
            return
        specs = {name: TensorSpec(entry.shape, dtype) for name, entry in shapes.items()}
        write_model_files(target, specs, produce)
    _write_companions(source, target)
    _write_config(source, target, dtype)


def export_adapter(source: ExportSource, lora: LoraConfig, target: Storage) -> None:
    """A LoRA run's adapter in peft's format, in fp32."""
    shapes = {adapter_name(entry.name): entry for entry in source.ref.manifest.parameters}
    with source.reader() as reader:

        def produce(name: str) -> torch.Tensor:
            entry = shapes[name]
            return reader.read(entry.name, "fp32", entry.numel, 0, entry.numel).reshape(entry.shape)

        specs = {name: TensorSpec(entry.shape, torch.float32) for name, entry in shapes.items()}
        write_tensors(target, ADAPTER_FILE, specs, produce, {"format": "pt"})
    _write_companions(source, target)
    config = peft_config(lora)
    config.base_model_name_or_path = source.model.base
    config.target_modules = {name.split(".lora_")[0].rpartition(".")[2] for name in shapes}
    config.inference_mode = True
    _write_saved(target, config.save_pretrained)


def export_merged(source: ExportSource, lora: LoraConfig, target: Storage, dtype: torch.dtype) -> None:
    """Base + adapter as one model: W + (alpha / rank) B A, summed in fp32 (Hu et al., arXiv 2106.09685)."""
    if source.model.random_init:
        raise BadInput("export.merge_lora needs the base's weights, and model.random_init=true has none")
    shapes = {entry.name: entry for entry in source.ref.manifest.parameters}
    with ExitStack() as stack:
        reader = stack.enter_context(source.reader())
        where = _base_tensors(source.base, stack)

        def part(module: str, which: str) -> torch.Tensor:
            entry = shapes[f"base_model.model.{module}.lora_{which}.default.weight"]
            return reader.read(entry.name, "fp32", entry.numel, 0, entry.numel).reshape(entry.shape)

        def produce(name: str) -> torch.Tensor:
            weight = where[name].get_tensor(name)
            module = name.removesuffix(".weight")
            if f"base_model.model.{module}.lora_A.default.weight" in shapes:
                weight = weight.float() + (lora.alpha / lora.rank) * (part(module, "B") @ part(module, "A"))
            return weight.to(dtype)

        adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for name in shapes}
        if missing := sorted(adapted - where.keys()):
            raise BadInput(f"the base's files hold no tensor {missing[0]!r}, so the adapter can't be merged into them")
        specs = {name: TensorSpec(tuple(file.get_slice(name).get_shape()), dtype) for name, file in where.items()}
        write_model_files(target, specs, produce)
    _write_companions(source, target)
    _write_config(source, target, dtype)


def write_model_files(
    target: Storage, specs: Mapping[str, TensorSpec], produce: Produce, max_file_bytes: int = MAX_FILE_BYTES
) -> None:
    """``model.safetensors``, or numbered files with an index where they would be larger than ``max_file_bytes``."""
    groups: list[dict[str, TensorSpec]] = [{}]
    room = max_file_bytes
    for name, spec in specs.items():
        if groups[-1] and spec.nbytes > room:
            groups.append({})
            room = max_file_bytes
        groups[-1][name] = spec
        room -= spec.nbytes
    if len(groups) == 1:
        write_tensors(target, "model.safetensors", groups[0], produce, {"format": "pt"})
        return
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    for file_name, group in zip(names, groups, strict=True):
        write_tensors(target, file_name, group, produce, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
        "weight_map": {name: names[i] for i, group in enumerate(groups) for name in group},
    }
    target.write("model.safetensors.index.json", [json.dumps(index, indent=1).encode()])


def adapter_name(name: str) -> str:
    """The name of an adapter's parameter in peft's files."""
    return name.replace(".default.", ".")


def _skeleton(source: ExportSource) -> Any:
    """The module without memory, to ask transformers about names."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(source.base, source.model))


def _renames_tensors(skeleton: Any) -> bool:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(skeleton, add_legacy=False))


def _save_through_transformers(
    source: ExportSource, skeleton: Any, target: Storage, produce: Produce, dtype: torch.dtype
) -> None:
    """For architectures whose files differ from their modules: needs memory for the whole model."""
    skeleton.to(dtype)
    state = {name: produce(name) for name, _ in skeleton.named_parameters()}
    skeleton.load_state_dict(state, strict=False, assign=True)
    skeleton.tie_weights()
    _write_saved(target, skeleton.save_pretrained)
    _write_companions(source, target)


def _base_tensors(base: Path, stack: ExitStack) -> dict[str, Any]:
    """Open safetensors file by tensor name."""
    from safetensors import safe_open

    where: dict[str, Any] = {}
    for path in weight_files(base):
        file = stack.enter_context(safe_open(path, framework="pt"))
        where |= dict.fromkeys(file.keys(), file)
    return where


def _write_companions(source: ExportSource, target: Storage) -> None:
    """Tokenizer, template and generation settings, byte for byte as the base has them."""
    found = {path.name: path for pattern in _COMPANIONS for path in source.base.glob(pattern) if path.is_file()}
    for name, path in sorted(found.items()):
        target.write(name, [path.read_bytes()])
    if source.chat_template is not None:
        target.write("chat_template.jinja", [source.chat_template.encode()])


def _write_config(source: ExportSource, target: Storage, dtype: torch.dtype) -> None:
    config = model_config(source.base, source.model)
    config.dtype = dtype
    config.architectures = config.architectures or [type(_skeleton(source)).__name__]
    config.use_cache = True
    _write_saved(target, config.save_pretrained)


def _write_saved(target: Storage, save_pretrained: Callable[[str], Any]) -> None:
    """Copy what a ``save_pretrained`` writes to the storage, configuration last."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder)
        for path in _config_last(Path(folder)):
            target.write(path.name, [path.read_bytes()])


def _config_last(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.iterdir(), key=lambda path: (path.name.endswith("config.json"), path.name))
