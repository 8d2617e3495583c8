"""Workers as plain processes of this machine, with torchrun's environment and without Ray."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster.config import ClusterConfig, MetricsConfig
from cluster.run_monitor import Monitor, NoMonitor
from data_shards.errors import BadInput
from trainer.config import WorkerSpec
from trainer.run_directory import RunDirectory, Say

ROOT = Path(__file__).resolve().parent.parent
_PR_SET_PDEATHSIG = 1
_GRACE_S = 5.0


def _die_with_parent() -> None:
    """Linux: get SIGKILL when the driver dies, so that no orphan goes on training."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class LocalProcesses:
    def __init__(self, config: ClusterConfig) -> None:
        self._config = config

    def check_capacity(self) -> None:
        """One GPU a worker where GPUs are used; CPU workers may share cores."""
        import torch

        gpus = torch.cuda.device_count()
        if self._config.use_gpu and not gpus:
            raise BadInput("cluster.use_gpu=true, but this machine has no GPU")
        if gpus and self._config.use_gpu is not False and self._config.num_workers > gpus:
            raise BadInput(
                f"cluster.num_workers={self._config.num_workers}, but this machine has {gpus} GPUs; with "
                "cluster.launcher=processes all workers run here"
            )

    def wait_for_room(self, cancelled: Callable[[], bool], say: Say) -> bool:
        """This machine is here, or nothing is."""
        return True

    def open_monitor(self, run: str, run_uri: str, config: MetricsConfig) -> Monitor:
        """None here: what a person debugs on one machine is watched in its log."""
        return NoMonitor()

    def run(self, spec: WorkerSpec) -> str:
        attempt = RunDirectory.at(spec.run_uri).attempt(spec.attempt)
        if attempt.local_path is None:
            raise BadInput("cluster.launcher=processes needs run.storage on a local or shared path")
        attempt.write("spec.json", [spec.model_dump_json(indent=1).encode()])
        port = free_port()
        return self._wait([self._start(rank, port, attempt.local_path / "spec.json") for rank in range(self._size)])

    @property
    def _size(self) -> int:
        return self._config.num_workers

    def _start(self, rank: int, port: int, spec: Path) -> subprocess.Popen[bytes]:
        threads = max(1, (os.cpu_count() or 1) // self._size)
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self._size),
            "LOCAL_WORLD_SIZE": str(self._size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        }
        environment.setdefault("OMP_NUM_THREADS", str(threads))
        if self._config.use_gpu is False:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        return subprocess.Popen(
            [sys.executable, "-m", "trainer.worker", str(spec)],
            env=environment,
            preexec_fn=_die_with_parent,
            start_new_session=True,  # a terminal's Ctrl-C is for the driver, which asks the workers to stop and save
        )

    def _wait(self, workers: list[subprocess.Popen[bytes]]) -> str:
        """Until all have ended; once one has failed, the rest get a little time to say why, then are ended."""
        deadline: float | None = None
        try:
            while any(worker.poll() is None for worker in workers):
                if deadline is None and any(worker.returncode for worker in workers):
                    deadline = time.monotonic() + _GRACE_S
                if deadline is not None and time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            lost = [
                f"rank {rank} {_describe(worker.returncode)}"
                for rank, worker in enumerate(workers)
                if worker.returncode not in (0, None)
            ]
        finally:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
                worker.wait()
        return "; ".join(lost)

    def close(self) -> None:
        """Nothing outlives ``run``."""


def _describe(returncode: int) -> str:
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"exited with {returncode}"
