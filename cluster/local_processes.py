"""Workers as plain processes of this machine, with torchrun's environment and without Ray.

On a machine without a GPU they are forks of one process that has imported the libraries: that costs some ten seconds
of a core, now once and not for every worker of every attempt. With GPUs each begins afresh, because what a library
does with CUDA while it is imported would not survive a fork.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

from cluster.config import ClusterConfig, MetricsConfig
from cluster.launcher import NEW, Past
from cluster.run_monitor import Monitor, NoMonitor
from data_shards.errors import BadInput
from data_shards.processes import end_with_parent
from trainer import oom_kills
from trainer.config import WorkerSpec
from trainer.metrics import MetricsSink
from trainer.run_directory import RunDirectory, Say, StopKind, StopRequest
from trainer.stop_signal import deadline_in, is_there

# Only what others wrote: the server may see another tree of ours than the driver runs (sys.path comes later, to forks).
PRELOAD = (
    "torch",
    "torch.distributed",
    "transformers",
    "transformers.modeling_utils",
    "transformers.models.llama.modeling_llama",
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",  # these two at the first engine
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "peft",
    "pyarrow",
    "pyarrow.fs",
    "pydantic",
)
GRACE_S = 5.0
KILL_S = 30.0
"""For a process to be gone after SIGKILL; one that is stuck in a driver's call may never be."""


def free_port() -> int:
    return free_port_at("127.0.0.1")


def free_port_at(host: str) -> int:
    """One of this machine's address ``host`` that nobody listened at a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


NO_MORE_GPUS = "the run has trained on GPUs so far. cluster.use_gpu=false goes on with CPUs, on purpose"


class LocalProcesses:
    def __init__(self, config: ClusterConfig) -> None:
        self._config = config

    def check_capacity(self, say: Say, past: Past = NEW) -> None:
        """One GPU a worker where GPUs are used; CPU workers may share cores."""
        import torch

        gpus = torch.cuda.device_count()
        if self._config.use_gpu and not gpus:
            raise BadInput("cluster.use_gpu=true, but this machine has no GPU")
        if past.on_gpus and not gpus and self._config.use_gpu is None:
            raise BadInput(f"this machine has no GPU; {NO_MORE_GPUS}")
        if gpus and self._config.use_gpu is not False and self._config.num_workers > gpus:
            raise BadInput(
                f"cluster.num_workers={self._config.num_workers}, but this machine has {gpus} GPUs; with "
                "cluster.launcher=processes all workers run here"
            )

    def wait_for_room(self, cancelled: Callable[[], bool], say: Say) -> int:
        """This machine is here, or nothing is."""
        return self._config.num_workers

    def open_monitor(self, run: str, run_uri: str, config: MetricsConfig) -> Monitor:
        """None here: what a person debugs on one machine is watched in its log."""
        return NoMonitor()

    def run(self, spec: WorkerSpec, num_workers: int, notify: Callable[[StopRequest], None]) -> str:
        if RunDirectory.at(spec.run_uri).storage.local_path is None:
            raise BadInput("cluster.launcher=processes needs run.storage on a local or shared path")
        import torch

        context = start_method(torch.cuda.device_count() > 0)
        environment = self._environment()
        workers = [
            context.Process(target=run_rank, args=(spec.model_dump(mode="json"), _of_rank(environment, rank)))
            for rank in range(num_workers)
        ]
        kills_before = oom_kills.count()
        lost = _run(workers, self._look_for_notice(notify))
        return "; ".join(filter(None, [lost, oom_kills.told(kills_before)])) if lost else ""

    def _look_for_notice(self, notify: Callable[[StopRequest], None]) -> Callable[[], None]:
        """What tells once that this machine, and with it the whole run here, will be taken away."""
        told: list[StopRequest] = []
        path = Path(self._config.notice_file) if self._config.notice_file else None

        def look() -> None:
            if path is None or told or not is_there(path):
                return
            told.append(StopRequest(f"{path} is there", StopKind.STOP, deadline_in(path)))
            notify(told[0])

        return look

    def check_reach(self, spec: WorkerSpec, say: Say) -> None:
        """There is but this machine."""

    def leave(self, node: str, request: StopRequest) -> None:
        """There is no other."""

    def _environment(self) -> dict[str, str]:
        """What all ranks are told: their server may be older than what was set here since."""
        size = self._config.num_workers
        found = dict(os.environ) | {
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // size))),
        }
        if self._config.use_gpu is False:
            found["CUDA_VISIBLE_DEVICES"] = ""
        return found

    def close(self) -> None:
        """Nothing outlives ``run``."""


def start_method(use_gpu: bool) -> SpawnContext | ForkServerContext:
    """For processes of workers: afresh, or as forks of one that has imported the libraries."""
    if use_gpu:
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks when it is imported
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOAD))  # heeded by the first attempt, which starts the server
    return context


def _of_rank(environment: Mapping[str, str], rank: int) -> dict[str, str]:
    return {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}


def run_rank(spec: Mapping[str, object], environment: Mapping[str, str], metrics: MetricsSink | None = None) -> None:
    """One rank of one attempt, in a process of its own."""
    os.environ.update(environment)
    os.setsid()  # a terminal's Ctrl-C is for the driver, which asks the workers to stop and save
    end_with_parent()  # no orphan goes on training
    import torch

    from trainer.worker import run_worker

    gc.freeze()  # DeepSpeed collects garbage on its way; of all that was imported none ever is

    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # OpenMP was loaded before it could be told
    try:
        run_worker(WorkerSpec.model_validate(spec), metrics)
    except Exception:
        traceback.print_exc()
        _leave(1)
    _leave(0)


def _leave(code: int) -> NoReturn:
    """At once: driver and ranks wait for this one as long as a thread that does not end keeps its process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(workers: Sequence[BaseProcess], look: Callable[[], None]) -> str:
    """Until all have ended; once one has failed, the rest get a little time to say why, then are ended. ``look`` is
    called all the while."""
    deadline: float | None = None
    try:
        with _sigterm_masked():
            for worker in workers:
                worker.start()
        while any(worker.exitcode is None for worker in workers):
            if deadline is None and any(worker.exitcode for worker in workers):
                deadline = time.monotonic() + GRACE_S
            if deadline is not None and time.monotonic() > deadline:
                break
            look()
            time.sleep(0.1)
        lost = [f"rank {rank} {describe(worker.exitcode)}" for rank, worker in enumerate(workers) if worker.exitcode]
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.kill()
                worker.join(KILL_S)
    return "; ".join(lost)


@contextmanager
def _sigterm_masked() -> Iterator[None]:
    """For processes that are started meanwhile: many send SIGTERM to all processes of a command (`ray job stop`,
    `timeout`, systemd), and theirs is to save what the driver then asks them to. SIGKILL still ends them."""
    resource_tracker.ensure_running()  # the first process starts it, and that takes the mask off
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def describe(exitcode: int) -> str:
    if exitcode < 0:
        return f"was ended by {signal.Signals(-exitcode).name}"
    return f"exited with {exitcode}"
