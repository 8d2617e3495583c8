"""What a plan starts from: the model's config without weights, the data as far as it is there, and the hardware."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_shards.corpus import fingerprint_of, fingerprint_parts, num_records, records_of
from data_shards.errors import BadInput, CorruptFile, DataError
from data_shards.manifest import DatasetManifest
from data_shards.prepare import TRAIN
from data_shards.reading.shard_reader import read_dataset_manifest
from data_shards.writing.packing import best_fit
from launch.architectures import PUBLISHED
from launch.config import Config
from launch.job import datasets_root, make_encoder
from trainer.activation_memory import Device
from trainer.errors import ModelError
from trainer.memory_plan import GIB
from trainer.model import model_config

_SAMPLE = 500
_USUAL_GPUS_PER_NODE = 8


class Origin(StrEnum):
    PREPARED = "prepared"
    ESTIMATED = "estimated"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class DataPlan:
    origin: Origin
    note: str
    packs: int | None = None
    tokens: int | None = None
    bytes: int | None = None
    """of the shards on disk"""


@dataclass(frozen=True)
class Target:
    """Where a worker will run."""

    device: Device
    memory_bytes: int
    """that one worker may take"""
    workers_per_node: int
    source: str
    assumed: bool
    """whether nobody said so, and nothing here showed it"""


def find_hf_config(config: Config, base: Path | None = None) -> tuple[Any, str]:
    """The transformers config of the base, with the overrides applied, and where it is from. Reads no weights.

    Raises:
        ModelError: neither a directory, nor a known architecture, nor reachable on the hub.
    """
    model = config.model
    path = base or Path(model.base).expanduser()
    if path.is_dir():
        return model_config(path, model), f"{path}/config.json"
    if model.base in PUBLISHED and model.revision is None:
        from transformers import AutoConfig

        values = dict(PUBLISHED[model.base])
        with tempfile.TemporaryDirectory() as folder:
            AutoConfig.for_model(values.pop("model_type"), **values).save_pretrained(folder)
            return model_config(Path(folder), model), f"the published architecture of {model.base}"
    return model_config(_config_from_hub(config), model), f"the hub's config.json of {model.base}"


def _config_from_hub(config: Config) -> Path:
    import huggingface_hub

    model = config.model
    try:
        file = huggingface_hub.hf_hub_download(model.base, "config.json", revision=model.revision)
    except (OSError, ValueError) as error:  # the hub's own errors are of these kinds
        known = ", ".join(sorted(PUBLISHED))
        raise ModelError(
            f"model.base={model.base!r}: no such directory here, and its config.json can't be had from the hub "
            f"({type(error).__name__}: {error}). Give a directory with a config.json; planned for without one: {known}"
        ) from error
    return Path(file).parent


def plan_of_prepared(manifest: DatasetManifest) -> DataPlan:
    split = manifest.splits[TRAIN]
    size = sum(shard.file.size for each in manifest.splits.values() for shard in each.shards)
    return DataPlan(Origin.PREPARED, "the prepared dataset", split.rows, split.tokens, size)


def look_at_data(config: Config) -> DataPlan:
    """Rows and tokens as prepared, else estimated from the first records, else unknown and why. Prepares nothing."""
    base = Path(config.model.base).expanduser()
    if not base.is_dir():
        return DataPlan(Origin.UNKNOWN, f"{config.model.base} is not on this machine, so its tokenizer isn't either")
    try:
        encoder = make_encoder(config, base)
        fingerprint = fingerprint_of(fingerprint_parts(config.data, encoder))
        return plan_of_prepared(read_dataset_manifest(datasets_root(config).child(fingerprint)))
    except (FileNotFoundError, CorruptFile):
        pass
    except DataError as error:
        return DataPlan(Origin.UNKNOWN, str(error))
    try:
        sample = list(islice(encoder.encode(islice(records_of(config.data, TRAIN), _SAMPLE)), _SAMPLE))
        records = round(num_records(config.data) * (1 - config.data.held_out_share))
    except DataError as error:
        return DataPlan(Origin.UNKNOWN, f"the data can't be prepared as it is: {error}")
    return _estimate(config, records, [len(encoded.sequence.input_ids) for encoded in sample])


def _estimate(config: Config, records: int, lengths: list[int]) -> DataPlan:
    fitting = np.array([length for length in lengths if length <= config.data.seq_len], np.int64)
    if not len(fitting):
        return DataPlan(Origin.UNKNOWN, f"none of the first {len(lengths)} records fits into data.seq_len")
    share = records / len(lengths)
    packs = max(1, round(len(best_fit(fitting, config.data.seq_len)) * share))
    tokens = round(int(fitting.sum()) * share)
    note = f"estimated from the first {len(lengths)} of {records:,} records; baton prepare makes it exact"
    return DataPlan(Origin.ESTIMATED, note, packs, tokens)


def evaluates(config: Config) -> bool:
    return config.data.holds_out


def find_target(config: Config, gpu_memory_gib: float | None = None, gpus_per_node: int | None = None) -> Target:
    """Flags before configuration before what this machine has; without a GPU anywhere, CPU workers here."""
    cluster = config.cluster
    per_node = gpus_per_node or cluster.gpus_per_node or _USUAL_GPUS_PER_NODE
    per_node = min(per_node, cluster.num_workers)
    memory = gpu_memory_gib or cluster.gpu_memory_gib
    if memory is not None:
        source = "--gpu-memory-gib" if gpu_memory_gib else "cluster.gpu_memory_gib"
        return Target(Device.GPU, round(memory * GIB), per_node, source, assumed=False)
    if cluster.use_gpu is not False and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Target(Device.GPU, properties.total_memory, per_node, f"this machine's {properties.name}", assumed=False)
    if cluster.use_gpu:
        raise BadInput(
            "cluster.use_gpu=true, and no GPU's memory is known here: give --gpu-memory-gib or cluster.gpu_memory_gib"
        )
    share = _machine_memory_bytes() // cluster.num_workers
    source = f"this machine's memory, shared by {cluster.num_workers} CPU workers"
    return Target(Device.CPU, share, cluster.num_workers, source, assumed=cluster.use_gpu is None)


def _machine_memory_bytes() -> int:
    """Of the machine, or of the container's limit (cgroup v2) where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def free_disk_bytes(config: Config) -> int | None:
    """Under ``run.storage``; None where it is not a local path."""
    if "://" in config.run.storage:
        return None
    path = Path(config.run.storage)
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
