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
    gpu_memory_gib: float | None = Field(
        None, gt=0, description="Memory of one GPU, for `baton plan`. Default: this machine's, if it has a GPU."
    )
    gpus_per_node: int | None = Field(
        None, ge=1, description="Workers that share a node's memory, for `baton plan`. Default: up to 8."
    )
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


class MetricsConfig(ConfigModel):
    """Prometheus figures of a run under Ray; `cluster.launcher=processes` and torchrun have none."""

    port: int = Field(9464, ge=0, le=65535, description="HTTP port on the driver's node; 0: no metrics.")
    address: str | None = Field(
        None, description="Address to listen on. Default: 0.0.0.0 on a cluster, 127.0.0.1 with an embedded Ray."
    )
    wait_for_last_scrape_s: float = Field(
        60, ge=0, description="Seconds at most that the end of a run waits for a scraper that has been coming."
    )
