"""Changes that would make a run need less memory, each with what it would then need (pure)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.plan_inputs import Target
from trainer.activation_memory import Device
from trainer.config import Attention
from trainer.memory_plan import Workload, memory_plan
from trainer.model_shape import ModelShape

_SHORTEST = 512
_MOST_WORKERS = 1024


@dataclass(frozen=True)
class Remedy:
    change: str
    """what to put on the command line"""
    required_bytes: int
    fits: bool


def remedies(workload: Workload, lora_shape: ModelShape | None, target: Target) -> Iterator[Remedy]:
    """Changes that need less memory, the cheapest first; the first ones also all together where none is enough."""
    capacity = target.memory_bytes
    cheap: list[Remedy] = []
    together, keys = workload, []
    for change, changed in _cheap_changes(workload):
        cheap.append(_remedy(change, changed, capacity))
        together = _merge(together, workload, changed)
        keys.append(change)
    yield from cheap
    if len(cheap) > 1 and not any(remedy.fits for remedy in cheap):
        yield _remedy(" ".join(keys), together, capacity)
    yield from _smallest_change(
        (_remedy(f"data.seq_len={length}", replace(workload, seq_len=length), capacity)
         for length in _halves(workload.seq_len)),
    )  # fmt: skip
    if target.device == Device.GPU:
        yield from _smallest_change(
            (_remedy(f"cluster.num_workers={workers}", replace(workload, world_size=workers), capacity)
             for workers in _doubles(workload.world_size)),
        )  # fmt: skip
    if lora_shape is not None:
        yield _remedy("training.method=lora", replace(workload, shape=lora_shape), capacity)


def _cheap_changes(workload: Workload) -> Iterator[tuple[str, Workload]]:
    """Those that change no result, only the speed."""
    if not workload.activation_checkpointing:
        yield "model.activation_checkpointing=true", replace(workload, activation_checkpointing=True)
    if workload.attention in (Attention.SDPA, Attention.EAGER):
        yield "model.attention=packed", replace(workload, attention=Attention.PACKED)
    if workload.micro_batch > 1:
        yield "training.micro_batch=1", replace(workload, micro_batch=1)
    if (workload.eval_micro_batch or 1) > 1:
        yield "evaluation.micro_batch=1", replace(workload, eval_micro_batch=1)
    if workload.zero.sub_group_size > 10**8:
        smaller = workload.zero.model_copy(update={"sub_group_size": 10**8})
        yield "zero.sub_group_size=100000000", replace(workload, zero=smaller)
    if workload.zero.max_live_parameters > 10**8:
        fewer = workload.zero.model_copy(update={"max_live_parameters": 10**8, "prefetch_bucket_size": 10**7})
        yield (
            "zero.max_live_parameters=100000000 zero.prefetch_bucket_size=10000000",
            replace(workload, zero=fewer),
        )  # fmt: skip


def _merge(into: Workload, original: Workload, changed: Workload) -> Workload:
    """``into`` with every field that ``changed`` has otherwise than ``original``; of ZeRO's, each key by itself."""
    different = {
        name: getattr(changed, name)
        for name in ("activation_checkpointing", "attention", "micro_batch", "eval_micro_batch")
        if getattr(changed, name) != getattr(original, name)
    }
    was, now = original.zero.model_dump(), changed.zero.model_dump()
    zero = into.zero.model_copy(update={key: now[key] for key in now if now[key] != was[key]})
    return replace(into, zero=zero, **different)


def _remedy(change: str, workload: Workload, capacity: int) -> Remedy:
    required = memory_plan(workload).required_bytes
    return Remedy(change, required, required <= capacity)


def _smallest_change(candidates: Iterator[Remedy]) -> Iterator[Remedy]:
    """The first that fits; else the last."""
    last = None
    for last in candidates:
        if last.fits:
            break
    if last is not None:
        yield last


def _halves(length: int) -> Iterator[int]:
    while (length := length // 2) >= _SHORTEST:
        yield length


def _doubles(workers: int) -> Iterator[int]:
    while (workers := workers * 2) <= _MOST_WORKERS:
        yield workers
