"""Memory of one worker, part by part, from shapes alone (pure). ``docs/memory.md`` gives every formula and its source.

What a rank holds all the time is exact to the byte, padding included; activations follow what is saved for backward;
temporaries of the moments are upper bounds or, where they say so, estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from trainer import activation_memory as activations
from trainer.activation_memory import Device, MicroBatchSize
from trainer.config import STATE_KEYS, Attention, Method, OptimizerName, TrainerConfig, ZeroConfig
from trainer.disk_plan import staging_bytes
from trainer.gathered_parameters import gathered
from trainer.model_shape import FP32, ModelShape, ParameterShape

GIB = 2**30

RUNTIME_BYTES = {Device.GPU: 2 * GIB, Device.CPU: 1 * GIB}
"""An allowance, no formula: CUDA context, NCCL's and cuBLAS's buffers on a GPU; Python and its libraries on a CPU."""
ALLOCATOR_SLACK = 0.05
"""An allowance for what the caching allocator rounds up and can't reuse, as a share of the peak; GPUs only."""


class Moment(StrEnum):
    BACKWARD = "backward"
    UPDATE = "update"
    EVALUATION = "evaluation"


@dataclass(frozen=True)
class Workload:
    """Everything that a worker's memory depends on."""

    shape: ModelShape
    world_size: int
    seq_len: int
    micro_batch: int
    eval_micro_batch: int | None
    """None where nothing is held out"""
    attention: Attention
    activation_checkpointing: bool
    optimizer: OptimizerName
    zero: ZeroConfig
    device: Device

    @classmethod
    def of(
        cls,
        config: TrainerConfig,
        shape: ModelShape,
        *,
        world_size: int,
        seq_len: int,
        evaluates: bool,
        device: Device,
    ) -> Workload:
        return cls(
            shape=shape,
            world_size=world_size,
            seq_len=seq_len,
            micro_batch=config.training.micro_batch,
            eval_micro_batch=config.evaluation.micro_batch if evaluates else None,
            attention=config.model.attention,
            activation_checkpointing=config.model.activation_checkpointing,
            optimizer=config.optimizer.name,
            zero=config.zero,
            device=device,
        )


class RankState(NamedTuple):
    """Bytes that each rank holds from the first step on; the same on every rank, because slices are padded."""

    weights: int
    """this rank's slices in the dtypes of forward and backward"""
    masters: int
    """fp32 copies of trained slices; of those that are fp32 anyway too (``stage3.py``, ``_create_fp32_partitions``)"""
    gradients: int
    """fp32, of trained slices, accumulated over a step's micro batches"""
    optimizer: int
    """fp32 states of trained slices, without Adam's step counters (4 bytes a sub-group)"""


def rank_state(parameters: Sequence[ParameterShape], world_size: int, optimizer: OptimizerName) -> RankState:
    """ZeRO-3's partitioning: ceil(n / W) elements of every parameter (arXiv 1910.02054, section 5)."""
    trained = [p for p in parameters if p.trained]
    elements = sum(p.partition(world_size) for p in trained)
    return RankState(
        weights=sum(p.partition(world_size) * p.itemsize for p in parameters),
        masters=elements * FP32,
        gradients=elements * FP32,
        optimizer=elements * FP32 * len(STATE_KEYS[optimizer]),
    )


def largest_sub_group(trained: Sequence[ParameterShape], world_size: int, sub_group_size: int) -> int:
    """Elements of the largest piece that the update takes at once on a rank.

    As DeepSpeed cuts each optimizer group (``stage3.py``, ``_create_fp16_sub_groups``); the groups are matrices and
    vectors (``trainer.engine.build_optimizer``).
    """
    largest = 0
    for matrices in (True, False):
        size = 0
        for parameter in (p for p in trained if (len(p.shape) >= 2) == matrices):
            size += parameter.partition(world_size)
            largest = max(largest, size)
            if size >= sub_group_size:
                size = 0
    return largest


def reduce_bytes(shape: ModelShape, zero: ZeroConfig, world_size: int) -> int:
    """The largest gradients on their way: one in its own dtype, its or a bucket's fp32 copies for the reduce-scatter.

    ``stage3.py``, ``__add_grad_to_ipg_bucket`` and ``__avg_scatter_grads``; ``coalesced_collectives.py``,
    ``reduce_scatter_coalesced``: a bucket is copied once to interleave the ranks' parts; a gradient larger than the
    bucket is cast (unless it is fp32) and copied only where it does not divide evenly.
    """
    bucket = min(zero.reduce_bucket_size, sum(p.numel for p in shape.trained)) * FP32
    largest = max(shape.trained, key=lambda p: p.numel)
    if largest.numel <= zero.reduce_bucket_size:
        return largest.numel * largest.itemsize + bucket
    cast = largest.numel * FP32 if largest.itemsize != FP32 else 0
    padded = largest.partition(world_size) * world_size * FP32 if largest.numel % world_size else 0
    return largest.numel * largest.itemsize + max(bucket, cast + padded)


def update_bytes(trained: Sequence[ParameterShape], workload: Workload) -> int:
    """While a sub-group is updated: its gradients flattened once more, and AdamW's denominator.

    ``stage3.py``, ``_prepare_fp32_grad_for_sub_group``; ``torch/optim/adamw.py`` (the square root of exp_avg_sq is a
    new tensor; on a CPU, where it runs tensor by tensor, also its quotient).
    """
    size = largest_sub_group(trained, workload.world_size, workload.zero.sub_group_size) * FP32
    if workload.optimizer == OptimizerName.SGD:
        return size
    return size * (3 if workload.device == Device.CPU else 2)


@dataclass(frozen=True)
class MemoryPlan:
    held: dict[str, int]
    """bytes by part, all the time"""
    moments: dict[Moment, dict[str, int]]
    """bytes by part that come on top at each moment"""
    runtime: int
    slack: int

    @property
    def worst(self) -> Moment:
        return max(self.moments, key=lambda moment: sum(self.moments[moment].values()))

    @property
    def held_bytes(self) -> int:
        return sum(self.held.values())

    @property
    def required_bytes(self) -> int:
        """Of one worker at its worst moment, allowances included."""
        return self.held_bytes + sum(self.moments[self.worst].values()) + self.runtime + self.slack


def memory_plan(workload: Workload) -> MemoryPlan:
    shape, zero, world_size = workload.shape, workload.zero, workload.world_size
    state = rank_state(shape.parameters, world_size, workload.optimizer)
    whole = gathered(shape, zero, world_size, recompute=workload.activation_checkpointing)
    held = {
        "weights": state.weights,
        "fp32 masters": state.masters,
        "gradients": state.gradients,
        "optimizer states": state.optimizer,
        "small parameters kept whole": whole.persistent_bytes,
        "reduce bucket": zero.reduce_bucket_size * FP32,
    }
    moments = {
        Moment.BACKWARD: _backward(workload) | {
            "gathered parameters": whole.peak_bytes,
            "gradients being reduced": reduce_bytes(shape, zero, world_size),
        },
        Moment.UPDATE: {"update of a sub-group": update_bytes(shape.trained, workload)},
    }  # fmt: skip
    gpu = workload.device == Device.GPU
    if not gpu:
        held["copy for saves"] = staging_bytes(shape.trained, world_size, STATE_KEYS[workload.optimizer])
    if workload.eval_micro_batch is not None:
        moments[Moment.EVALUATION] = _evaluation(workload) | {"gathered parameters": whole.peak_bytes}
    dynamic = max(sum(parts.values()) for parts in moments.values())
    return MemoryPlan(
        held=held,
        moments=moments,
        runtime=RUNTIME_BYTES[workload.device],
        slack=round(ALLOCATOR_SLACK * (sum(held.values()) + dynamic)) if gpu else 0,
    )


def _backward(workload: Workload) -> dict[str, int]:
    """Activations and what is computed on top of them, at the end of forward or, with checkpointing, in a layer."""
    shape, attention, device = workload.shape, workload.attention, workload.device
    tokens = workload.micro_batch * workload.seq_len
    size = MicroBatchSize(tokens, tokens)  # every token trained: the most that a pack can hold
    saved = activations.saved_bytes(
        shape, attention, device, size, checkpointing=workload.activation_checkpointing
    )  # fmt: skip
    log_probabilities = activations.loss_bytes(shape, size)
    at_head = activations.loss_peak_bytes(shape, size)
    again = activations.layer_bytes(shape, attention, device, tokens) if workload.activation_checkpointing else 0
    in_layer = again + activations.layer_work_bytes(shape, attention, tokens)
    parts = {"activations": saved - log_probabilities}
    if at_head >= in_layer:
        return parts | {"logits and loss": at_head}
    return parts | {"a layer's recomputation and gradients" if again else "a layer's gradients": in_layer}


def _evaluation(workload: Workload) -> dict[str, int]:
    """Without gradients: the logits of a micro batch, and one layer's widest values."""
    shape = workload.shape
    assert workload.eval_micro_batch is not None
    tokens = workload.eval_micro_batch * workload.seq_len
    size = MicroBatchSize(tokens, tokens)
    w, b = shape.widths, shape.itemsize
    layer = tokens * (3 * w.ffn * b + w.hidden * (2 * FP32 + 2 * b))
    if shape.method == Method.LORA and b != FP32:
        layer += 2 * tokens * w.ffn * FP32
    hidden = tokens * w.hidden * b
    return {"hidden states": hidden, "logits and loss": max(activations.loss_peak_bytes(shape, size), layer)}
