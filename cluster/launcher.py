"""The interface between the driver's loop and what runs workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from cluster.config import ClusterConfig, Launcher, MetricsConfig
from cluster.run_monitor import Monitor
from trainer.config import WorkerSpec
from trainer.run_directory import Say, StopRequest


class WorkerLauncher(Protocol):
    """Runs the workers of one attempt at a time."""

    def check_capacity(self, *, on_gpus: bool = False) -> None:
        """Called once, before data is prepared. Raises BadInput, saying what is wanted and what there is.

        Args:
            on_gpus: the run has trained on GPUs so far, so it does not go on without unless that is said.
        """
        ...

    def check_reach(self, spec: WorkerSpec, say: Say) -> None:
        """Called once, before the first attempt. Raises BadInput where machines lack what ``spec`` names."""
        ...

    def wait_for_room(self, cancelled: Callable[[], bool], say: Say) -> int:
        """Called before each attempt: block until its workers could be placed. Returns how many; 0: cancelled, or
        waited too long."""
        ...

    def open_monitor(self, run: str, run_uri: str, config: MetricsConfig) -> Monitor:
        """Called once, before the first attempt: where the run's metrics go. Whoever calls it closes the monitor."""
        ...

    def run(self, spec: WorkerSpec, num_workers: int, notify: Callable[[StopRequest], None]) -> str:
        """Run one attempt to its end, whatever it is. Returns what was lost (signals, exit codes), empty if nothing.

        Args:
            notify: called, on any thread, with what is seen meanwhile for which the attempt should save and end.
        """
        ...

    def leave(self, node: str, request: StopRequest) -> None:
        """Place no worker on a machine any more that a worker has told will be taken away."""
        ...

    def close(self) -> None:
        """Called once, at the end, also after errors."""
        ...


def _make_launcher(config: ClusterConfig) -> WorkerLauncher:
    """The one that ``cluster.launcher`` names; only its own libraries are imported."""
    if config.launcher == Launcher.PROCESSES:
        from cluster.local_processes import LocalProcesses

        return LocalProcesses(config)
    from cluster.ray_train import RayTrain

    return RayTrain(config)


@contextmanager
def launching(config: ClusterConfig) -> Iterator[WorkerLauncher]:
    """A launcher that is closed in the end."""
    launcher = _make_launcher(config)
    try:
        yield launcher
    finally:
        launcher.close()
