"""The interface between the driver's loop and what runs workers."""

from __future__ import annotations

from typing import Protocol

from trainer.config import WorkerSpec


class WorkerLauncher(Protocol):
    """Runs the workers of one attempt at a time."""

    def check_capacity(self) -> None:
        """Called once, before data is prepared. Raises BadInput, saying what is wanted and what there is."""
        ...

    def run(self, spec: WorkerSpec) -> str:
        """Run one attempt to its end, whatever it is. Returns what was lost (signals, exit codes), empty if nothing."""
        ...

    def close(self) -> None:
        """Called once, at the end, also after errors."""
        ...
