"""The interface between the driver's loop and what runs workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from cluster.config import ClusterConfig, Launcher, MetricsConfig
from cluster.run_monitor import Monitor
from data_shards.errors import BatonError
from trainer.config import WorkerSpec
from trainer.run_directory import Say, StopRequest


class ClusterFailed(BatonError):
    """What the workers were to run on."""


@dataclass(frozen=True)
class Past:
    """What a launcher should know of a run before it."""

    has_begun: bool = False
    on_gpus: bool | None = None
    """whether it trained on GPUs; None: it has not trained yet"""


NEW = Past()


class WorkerLauncher(Protocol):
    """Runs the workers of one attempt at a time."""

    def check_capacity(self, say: Say, past: Past = NEW) -> None:
        """Called once; for a new run before data is prepared. Raises BadInput, saying what is wanted and what there is.

        Args:
            past: of the run. One that has begun is not refused where its machines may still come: they are waited for
                as before any attempt. One that has trained on GPUs does not go on without, unless that is said.
        """
        ...

    def check_reach(self, spec: WorkerSpec, say: Say) -> None:
        """Called once, before the first attempt. Raises BadInput where machines lack what ``spec`` names."""
        ...

    def wait_for_room(self, cancelled: Callable[[], bool], say: Say) -> int:
        """Called before each attempt: block until its workers could be placed. Returns how many; 0: cancelled, or
        waited too long.

        Args:
            say: called with what it waits for, in one line, where that takes longer than a moment.
        """
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
    """A launcher that is closed in the end.

    Raises ClusterFailed for what Ray raises meanwhile, so that nobody is shown a traceback of Ray's.
    """
    launcher = _make_launcher(config)
    try:
        yield launcher
    except Exception as error:
        if isinstance(error, BatonError) or type(error).__module__.partition(".")[0] != "ray":
            raise
        raise ClusterFailed(
            f"the Ray cluster failed: {type(error).__name__}: {str(error).strip()[:500]}. Nothing committed is lost; "
            "run the same command again once the cluster is well"
        ) from error
    finally:
        launcher.close()
