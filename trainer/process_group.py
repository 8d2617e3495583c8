"""The process group, from the environment that torchrun, Ray Train or our own launcher set."""

from __future__ import annotations

import importlib
import os
import socket
import warnings
from collections import defaultdict
from contextlib import suppress
from datetime import timedelta

import torch

from data_shards.errors import BadInput
from trainer.host_memory import keep_freed_memory


def choose_accelerator() -> None:
    """Tell DeepSpeed which device to use before it is imported: GPUs when there are any, else CPU with gloo."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _import_muon_uncompiled() -> None:
    """DeepSpeed's stage 3 imports its Muon optimizer, used or not, and torch.compile in there loads all of inductor:
    three seconds of every worker's start."""
    with suppress(ImportError):  # other versions of DeepSpeed have it elsewhere, and are only slower
        from deepspeed.runtime import compiler

        compiled = compiler.compile
        compiler.compile = lambda *args, **options: lambda function: function
        try:
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        finally:
            compiler.compile = compiled


def start_process_group(timeout_s: float = 1800) -> None:
    """Join the group that ``RANK``, ``WORLD_SIZE`` and ``MASTER_ADDR:PORT`` describe, unless joined already.

    Raises BadInput where this worker was given a GPU that torch can't use.
    """
    _refuse_a_lost_gpu()
    choose_accelerator()
    # DeepSpeed's collectives use names that torch deprecates: a warning a step would bury the progress lines.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    import deepspeed

    # At start-up DeepSpeed would try a compiler for each of its ops, and compile a shared-memory all-reduce for CPU
    # inference (a minute on a small machine); training never calls it, and nothing else asks which ops there are
    # (deepspeed/comm/torch.py, inference_all_reduce).
    deepspeed.ops.__compatible_ops__ = defaultdict(bool)
    _import_muon_uncompiled()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(_local_rank())
    else:
        keep_freed_memory()
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=timeout_s), verbose=False)


def _refuse_a_lost_gpu() -> None:
    """Else it would train on the CPU, unnoticed, or wait in a gloo group for others in an NCCL one."""
    given = os.environ.get(GPUS_GIVEN)
    if given and not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        raise BadInput(
            f"{node_id()}: the worker was given a GPU there ({given}), and torch {torch.__version__}, which {built}, "
            "can't use it. Look at nvidia-smi and at the driver's version on that machine, or install another torch; "
            "cluster.use_gpu=false trains on CPUs"
        )


NODE_ID = "BATON_NODE_ID"
GPUS_GIVEN = "BATON_GPUS_GIVEN"
"""The devices that Ray has set aside for the workers of this machine."""


def node_id() -> str:
    """What whoever launched this worker calls its machine, else the machine's own name."""
    return os.environ.get(NODE_ID) or socket.gethostname()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_on_node() -> bool:
    """For what one worker of each node does."""
    return _local_rank() == 0


def leave_process_group() -> None:
    """Call it once all work is done. A process that exits while it is in a gloo group sometimes aborts ("terminate
    called without an active exception": 3 of 80 did), since gloo's threads outlive the interpreter.

    Not for a rank that has failed: NCCL may wait for ranks that are still in a collective.
    """
    from deepspeed import comm

    comm.destroy_process_group()


def anywhere(wish: bool, device: torch.device) -> bool:
    """Whether it is so on any rank. Collective."""
    count = torch.tensor(float(wish), device=device)
    torch.distributed.all_reduce(count)
    return bool(count > 0)
