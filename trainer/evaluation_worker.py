"""One worker of an evaluation: a checkpoint, a base or an exported model, over one split; rank 0 writes the result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from data_shards.errors import BadInput, BatonError
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from trainer import checkpoint
from trainer.checkpoint import SliceReader
from trainer.config import EvaluationTask, WorkerSpec
from trainer.deepspeed_config import deepspeed_config
from trainer.evaluate import EvaluationResult, evaluate
from trainer.export import ADAPTER_FILE, adapter_name
from trainer.forward_engine import ForwardEngine, ReadSlice
from trainer.model import model_to_train
from trainer.pulse import Phase, Pulse
from trainer.run_directory import utc_now, write_json

Shapes = dict[str, tuple[int, ...]]


class StoredWeights(NamedTuple):
    """Trained weights that were saved somewhere."""

    where: str
    shapes: Shapes
    read: ReadSlice


@contextmanager
def stored_weights(spec: WorkerSpec, task: EvaluationTask, wanted: Shapes) -> Iterator[StoredWeights | None]:
    """What ``spec`` names, open for reading; None where the base is evaluated as it is."""
    if task.adapter is not None:
        with _adapter_weights(Path(task.adapter), wanted) as weights:
            yield weights
    elif spec.init_from is not None:
        ref = checkpoint.read_manifest(*Storage.holding(spec.init_from))
        entries = {entry.name: entry for entry in ref.manifest.parameters}
        with SliceReader(Storage.at(spec.init_from), ref) as reader:

            def read(name: str, start: int, stop: int) -> torch.Tensor:
                return reader.read(name, "fp32", entries[name].numel, start, stop)

            yield StoredWeights(spec.init_from, {name: entry.shape for name, entry in entries.items()}, read)
    else:
        yield None


@contextmanager
def _adapter_weights(folder: Path, wanted: Shapes) -> Iterator[StoredWeights]:
    """A peft folder, whose tensors are named without the adapter's own name."""
    from safetensors import safe_open

    names = {adapter_name(name): name for name in wanted}
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        shapes = {names.get(key, key): tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            return file.get_tensor(adapter_name(name)).float().flatten()[start:stop]

        yield StoredWeights(str(folder), shapes, read)


def check_shapes(wanted: Shapes, stored: StoredWeights) -> None:
    """Raises BadInput where the weights were saved from another model."""
    if wanted != stored.shapes:
        different = sorted(wanted.items() ^ stored.shapes.items())[:4]
        raise BadInput(
            f"{stored.where} holds other parameters than this model: {different}. Give the configuration that it was "
            "trained with: model.base, model.config_overrides, training.method and training.lora"
        )


def build_forward_engine(spec: WorkerSpec, task: EvaluationTask) -> ForwardEngine:
    """Raises BadInput where the weights do not fit the model, CheckpointCorrupt where they do not read back."""
    config = spec.trainer
    zero = deepspeed_config(config.model.precision, 0.0, config.zero)
    model = model_to_train(config, zero)
    wanted = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters() if p.requires_grad}
    with stored_weights(spec, task, wanted) as stored:
        if stored is not None:
            check_shapes(wanted, stored)
        return ForwardEngine(model, zero, stored.read if stored else None)


def evaluate_model(spec: WorkerSpec, pulse: Pulse) -> EvaluationResult:
    """Build this rank's part of the model, score the split, and on rank 0 write ``<run_uri>/<task.result>``."""
    task = spec.evaluation
    if task is None:
        raise BatonError("this specification asks for no evaluation")
    engine = build_forward_engine(spec, task)
    dataset = Storage.at(spec.dataset_uri)
    source = SplitReader(dataset, read_dataset_manifest(dataset), task.split)
    started = time.perf_counter()
    result = evaluate(engine, source, spec.trainer.evaluation.micro_batch, beat=partial(pulse.beat, Phase.EVALUATION))
    seconds = time.perf_counter() - started
    if engine.rank == 0:
        record = {
            **task.about,
            "split": task.split,
            "rows": source.num_rows,
            **result._asdict(),
            "perplexity": result.perplexity,
            "accuracy": result.accuracy,
            "fingerprint": spec.fingerprint,
            "precision": spec.trainer.model.precision.value,
            "world_size": engine.world_size,
            "device": engine.device.type,
            "seconds": seconds,
            "evaluation": spec.attempt,
            "written": utc_now(),
        }
        write_json(Storage.at(spec.run_uri), task.result, record)
    return result
