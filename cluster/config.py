"""What can be chosen about workers."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from data_shards.config import ConfigModel


class Launcher(StrEnum):
    RAY = "ray"
    PROCESSES = "processes"


class ClusterConfig(ConfigModel):
    launcher: Launcher = Field(
        Launcher.RAY, description="ray: Ray Train, on the cluster at hand or an embedded one. processes: this machine."
    )
    num_workers: int = Field(1, ge=1, description="One per GPU, or CPU processes.")
    cpus_per_worker: float = Field(1, gt=0, description="CPU slots that a worker asks Ray for.")
    use_gpu: bool | None = Field(None, description="Default: GPUs if the cluster has any.")
    wait_for_capacity_s: float = Field(
        15, ge=0, description="Seconds to wait for nodes before a job that can't be placed is refused."
    )
    wait_for_room_s: float = Field(
        3600, ge=0, description="Seconds to wait, before each attempt, for lost nodes to come back or others to finish."
    )
    max_failures_without_progress: int = Field(
        3, ge=0, description="Attempts that may fail in a row without committing anything new."
    )
    collective_timeout_s: float = Field(1800, gt=0, description="Seconds until a hung collective fails.")
