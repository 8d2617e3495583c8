"""A plan as figures (pure)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from launch.config import Config
from launch.plan_inputs import DataPlan, Target, evaluates
from launch.plan_remedies import Remedy, remedies
from trainer.batch_geometry import rank_micro_batches
from trainer.config import STATE_KEYS
from trainer.disk_plan import checkpoint_bytes, export_bytes, fast_tier_bytes, retained_checkpoints, staging_bytes
from trainer.memory_plan import MemoryPlan, Workload, memory_plan
from trainer.model_shape import ModelShape, count
from trainer.worker import total_rows


@dataclass(frozen=True)
class Geometry:
    """One full step over the ranks."""

    workers: int
    global_batch: int
    micro_batch: int
    packs_per_rank: tuple[int, int]
    """least and most"""
    grad_accum_steps: int
    tokens_per_step: int
    """at most"""


@dataclass(frozen=True)
class DiskPlan:
    checkpoint_bytes: int
    kept: int
    """at the worst moment"""
    exports: dict[str, int]
    dataset_bytes: int | None
    free_bytes: int | None
    fast_bytes_per_worker: int
    """of the fast tier, on its node's own disk, at the worst moment"""

    @property
    def needed_bytes(self) -> int:
        return self.checkpoint_bytes * self.kept + sum(self.exports.values()) + (self.dataset_bytes or 0)

    @property
    def fits(self) -> bool:
        return self.free_bytes is None or self.needed_bytes <= self.free_bytes


@dataclass(frozen=True)
class Report:
    run: str
    source: str
    shape: ModelShape
    data: DataPlan
    steps: int | None
    geometry: Geometry
    target: Target
    memory: MemoryPlan
    remedies: tuple[Remedy, ...]
    staging_bytes_per_worker: int
    """host memory for the copies that saves write"""
    disk: DiskPlan

    @property
    def memory_fits(self) -> bool:
        return self.memory.required_bytes <= self.target.memory_bytes

    @property
    def fits(self) -> bool:
        return self.memory_fits and self.disk.fits


def make_report(
    config: Config,
    shape: ModelShape,
    source: str,
    data: DataPlan,
    target: Target,
    free_bytes: int | None,
    lora_shape: ModelShape | None,
) -> Report:
    """Put a plan together.

    Args:
        source: where the shape is from.
        lora_shape: the same base with adapters, to tell what that would need; None where it has them already.
    """
    workload = Workload.of(
        config.trainer(),
        shape,
        world_size=config.cluster.num_workers,
        seq_len=config.data.seq_len,
        evaluates=evaluates(config),
        device=target.device,
    )
    memory = memory_plan(workload)
    short = memory.required_bytes > target.memory_bytes
    keys = STATE_KEYS[config.optimizer.name]
    return Report(
        run=config.run.name,
        source=source,
        shape=shape,
        data=data,
        steps=num_steps(config, data),
        geometry=geometry(config),
        target=target,
        memory=memory,
        remedies=tuple(remedies(workload, lora_shape, target)) if short else (),
        staging_bytes_per_worker=staging_bytes(shape.trained, workload.world_size, keys),
        disk=DiskPlan(
            checkpoint_bytes=checkpoint_bytes(shape.trained, workload.world_size, keys),
            kept=retained_checkpoints(config.checkpoint, num_steps(config, data)),
            exports=_exports(config, shape),
            dataset_bytes=data.bytes,
            free_bytes=free_bytes,
            fast_bytes_per_worker=fast_tier_bytes(config.checkpoint, shape.trained, workload.world_size, keys),
        ),
    )


def num_steps(config: Config, data: DataPlan) -> int | None:
    """None where it depends on data that nobody has seen."""
    if data.packs is None:
        return config.training.steps
    rows = total_rows(config.training, data.packs)
    return -(-rows // config.training.global_batch)


def geometry(config: Config) -> Geometry:
    training, workers = config.training, config.cluster.num_workers
    parts = [
        rank_micro_batches(
            training.global_batch, rank=rank, world_size=workers, micro_batch_size=training.micro_batch
        )
        for rank in (0, workers - 1)
    ]  # fmt: skip
    most, least = (sum(stop - start for start, stop in part) for part in parts)
    return Geometry(
        workers=workers,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        packs_per_rank=(least, most),
        grad_accum_steps=len(parts[0]),
        tokens_per_step=training.global_batch * config.data.seq_len,
    )


def _exports(config: Config, shape: ModelShape) -> dict[str, int]:
    if not config.export.at_end:
        return {}
    dtype_bytes = 4 if (config.export.dtype or config.model.precision.value) == "fp32" else 2
    return export_bytes(shape, dtype_bytes, merge_lora=config.export.merge_lora)


def as_json(report: Report) -> dict[str, Any]:
    """Every figure, in bytes, under stable names."""
    shape, memory, target = report.shape, report.memory, report.target
    return {
        "run": report.run,
        "fits": report.fits,
        "model": {
            "kind": shape.kind,
            "source": report.source,
            "parameters": shape.num_parameters,
            "base_parameters": count(shape.base),
            "trained_parameters": count(shape.trained),
            "method": shape.method.value,
            "precision": shape.precision.value,
        },
        "data": asdict(report.data),
        "steps": report.steps,
        "geometry": asdict(report.geometry),
        "memory": {
            "device": target.device.value,
            "available_bytes": target.memory_bytes,
            "available_source": target.source,
            "required_bytes": memory.required_bytes,
            "fits": report.memory_fits,
            "held": memory.held,
            "moments": {moment.value: parts for moment, parts in memory.moments.items()},
            "worst_moment": memory.worst.value,
            "runtime_allowance": memory.runtime,
            "allocator_allowance": memory.slack,
        },
        "host": {
            "staging_bytes_per_worker": report.staging_bytes_per_worker,
            "workers_per_node": target.workers_per_node,
        },
        "disk": asdict(report.disk) | {"needed_bytes": report.disk.needed_bytes, "fits": report.disk.fits},
        "remedies": [asdict(remedy) for remedy in report.remedies],
    }
