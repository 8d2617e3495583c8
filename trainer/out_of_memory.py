"""What a lack of memory is told as: where, how much there was, what the plan had said, and which knobs there are."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from data_shards.config import DataConfig
from trainer.activation_memory import Device
from trainer.base_location import locate_base
from trainer.config import TrainerConfig, WorkerSpec
from trainer.errors import OutOfMemory, OutOfMemoryLate
from trainer.memory_plan import GIB, MemoryPlan, Workload, memory_plan
from trainer.model import model_config
from trainer.model_shape import model_shape
from trainer.pulse import Phase, Pulse

MANY_STEPS = 20
"""Packs, and so tensors, are of the same sizes in each step: what fitted so often is short of memory for another reason
than its size."""
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: (?:can't|not enough)|CUDA(?: error:)? out of memory|Cannot allocate memory"
)


@dataclass(frozen=True)
class MemoryFigures:
    """In bytes; of a GPU as torch's allocator and the driver see it, of a host as the kernel does."""

    device: Device
    allocated: int
    """in use by tensors; of a host, by this process"""
    reserved: int
    """from the device, by torch; of a host the same as ``allocated``"""
    free: int
    total: int


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def named(error: Exception, spec: WorkerSpec, pulse: Pulse, *, rank: int, world_size: int) -> Exception:
    """A lack of memory in words that help; any other error as it is."""
    if not is_out_of_memory(error):
        return error
    figures = memory_figures(_device_of(error))
    text = message(
        figures,
        planned(spec, world_size, figures.device),
        spec.trainer,
        where=f"rank {rank} on {socket.gethostname()}",
        step=pulse.step,
        phase=pulse.phase,
        good_steps=pulse.num_steps,
        said=str(error).strip().split("\n")[0][:300],
    )
    kind = OutOfMemoryLate if pulse.num_steps >= MANY_STEPS else OutOfMemory
    return kind(text).with_traceback(error.__traceback__)


def _device_of(error: BaseException) -> Device:
    """Whose memory it was."""
    host = isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error)
    return Device.CPU if host or not torch.cuda.is_available() else Device.GPU


def memory_figures(device: Device) -> MemoryFigures:
    if device == Device.GPU:
        free = total = 0
        with suppress(RuntimeError):  # the driver may answer nothing any more
            free, total = torch.cuda.mem_get_info()
        return MemoryFigures(device, torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), free, total)
    mine = _kib("/proc/self/status", "VmRSS")
    return MemoryFigures(device, mine, mine, _kib("/proc/meminfo", "MemAvailable"), _kib("/proc/meminfo", "MemTotal"))


def _kib(path: str, name: str) -> int:
    """Bytes of a line such as ``VmRSS:  12 kB``; 0 where there is none."""
    with suppress(OSError):
        if found := re.search(rf"^{name}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    return 0


def planned(spec: WorkerSpec, world_size: int, device: Device) -> MemoryPlan | None:
    """What ``baton plan`` says of this worker; None for models that it does not serve."""
    config = spec.trainer
    with suppress(Exception):  # whatever it is, it must not hide what is to be told
        hf_config = model_config(locate_base(config.model), config.model)
        shape = model_shape(hf_config, config.model.precision, config.training.method, config.training.lora)
        data = DataConfig.model_validate(spec.resolved_config["data"])
        return memory_plan(
            Workload.of(
                config,
                shape,
                world_size=world_size,
                seq_len=data.seq_len,
                evaluates=data.holds_out,
                device=device,
            )
        )
    return None


def message(
    figures: MemoryFigures,
    plan: MemoryPlan | None,
    config: TrainerConfig,
    *,
    where: str,
    step: int,
    phase: Phase,
    good_steps: int,
    said: str,
) -> str:
    """All that a person needs (pure).

    Args:
        good_steps: of this attempt, before it.
        said: by the library that found no memory.
    """
    whose = "GPU" if figures.device == Device.GPU else "host"
    held = "by this process" if figures.device == Device.CPU else f"in tensors, {_gib(figures.reserved)} reserved"
    text = (
        f"{where} ran out of {whose} memory in step {step}, {phase.value}, after {good_steps} good steps: "
        f"{_gib(figures.allocated)} {held}, {_gib(figures.free)} free of {_gib(figures.total)}"
    )
    if plan is not None:
        text += f". The plan had said {_gib(plan.required_bytes)} for this worker, at its worst in {plan.worst.value}"
    if good_steps >= MANY_STEPS:
        text += ". So many steps had fitted: memory is fragmented, or somebody else's"
        if figures.device == Device.GPU:
            text += "; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True helps against the former"
    return f"{text}. If it comes again: {', or '.join(_knobs(config, phase))}. ({said})"


def _knobs(config: TrainerConfig, phase: Phase) -> Iterator[str]:
    if phase == Phase.EVALUATION and config.evaluation.micro_batch > 1:
        yield f"lower evaluation.micro_batch (now {config.evaluation.micro_batch})"
    if config.training.micro_batch > 1:
        yield f"lower training.micro_batch (now {config.training.micro_batch}; results stay the same)"
    if not config.model.activation_checkpointing:
        yield "set model.activation_checkpointing=true"
    yield "lower data.seq_len"
    yield "use more workers (cluster.num_workers)"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
