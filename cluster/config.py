"""What can be chosen about workers."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from data_shards.config import ConfigModel


class Launcher(StrEnum):
    RAY = "ray"
    PROCESSES = "processes"


class WorkerBounds(ConfigModel):
    """An attempt takes as many workers as the cluster can place, within these bounds. How many never changes which rows
    a step trains on."""

    min: int = Field(1, ge=1, description="Fewer are waited for (cluster.wait_for_room_s).")
    max: int = Field(ge=1, description="As many as there are at best.")
    settle_s: float = Field(
        30, ge=0, description="Seconds that an attempt waits for the greatest number before it begins with fewer."
    )
    grow_after_s: float = Field(
        300, ge=0, description="Seconds that an attempt trains before it saves and makes way for one with more workers."
    )

    @model_validator(mode="after")
    def _check_order(self) -> WorkerBounds:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is more than max={self.max}")
        return self


class ClusterConfig(ConfigModel):
    launcher: Launcher = Field(
        Launcher.RAY, description="ray: Ray Train, on the cluster at hand or an embedded one. processes: this machine."
    )
    num_workers: int = Field(1, ge=1, description="One per GPU, or CPU processes. With `workers` it is their max.")
    workers: WorkerBounds | None = Field(
        None, description="Instead of `num_workers`, for launcher=ray: go on with fewer when nodes are lost, grow back."
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPU slots that a worker asks Ray for.")
    use_gpu: bool | None = Field(
        None, description="Default: GPUs if the cluster has any, or has some within `wait_for_capacity_s`."
    )
    gpu_memory_gib: float | None = Field(
        None, gt=0, description="Memory of one GPU, for `baton plan`. Default: this machine's, if it has a GPU."
    )
    gpus_per_node: int | None = Field(
        None, ge=1, description="Workers that share a node's memory, for `baton plan`. Default: up to 8."
    )
    wait_for_capacity_s: float = Field(
        15, ge=0, description="Seconds to wait for nodes before a new run that can't be placed is refused."
    )
    wait_for_room_s: float = Field(
        3600, ge=0, description="Seconds to wait, before each attempt, for lost nodes to come back or others to finish."
    )
    max_failures_without_progress: int = Field(
        3, ge=0, description="Attempts that may fail in a row without committing anything new."
    )
    collective_timeout_s: float = Field(1800, gt=0, description="Seconds until a hung collective fails.")
    stop_grace_s: float | None = Field(
        None,
        gt=0,
        description="Seconds from SIGTERM to the driver until it is killed. Where the last save took longer, none is "
        "tried. Default: not known; it is always tried.",
    )
    notice_file: str | None = Field(
        None,
        description="Path that an agent of the cloud makes on a node that will be taken away; it may hold the seconds "
        "left. The run saves, and goes on elsewhere.",
    )
    notice_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="HTTP port of the driver for such notices (docs/preemption.md); needs BATON_NOTICE_TOKEN. 0: none.",
    )

    @model_validator(mode="before")
    @classmethod
    def _count_with_the_greatest(cls, values: Any) -> Any:
        """For the plan, and wherever one number is asked for."""
        if isinstance(values, dict) and "num_workers" not in values and isinstance(values.get("workers"), dict):
            return values | {"num_workers": values["workers"].get("max", 1)}
        return values

    @model_validator(mode="after")
    def _check_notices(self) -> ClusterConfig:
        is_ray = self.launcher == Launcher.RAY
        if is_ray and self.notice_file is not None and not Path(self.notice_file).is_absolute():
            raise ValueError(
                f"notice_file={self.notice_file!r} must begin with /: workers have other working folders than this one"
            )
        if self.notice_port and not is_ray:
            raise ValueError("notice_port is for launcher=ray; processes of one machine take notice_file, or SIGTERM")
        return self

    @model_validator(mode="after")
    def _check_workers(self) -> ClusterConfig:
        if self.workers is None:
            return self
        if self.launcher == Launcher.PROCESSES and self.workers.min < self.workers.max:
            raise ValueError("workers are bounds for launcher=ray; processes of one machine are num_workers")
        if self.num_workers != self.workers.max:
            raise ValueError(
                f"num_workers={self.num_workers} and workers.max={self.workers.max} contradict each other; give workers"
            )
        return self

    @property
    def min_workers(self) -> int:
        """The fewest that an attempt begins with."""
        return self.workers.min if self.workers else self.num_workers


class MetricsConfig(ConfigModel):
    """Prometheus figures of a run under Ray; `cluster.launcher=processes` and torchrun have none."""

    port: int = Field(9464, ge=0, le=65535, description="HTTP port on the driver's node; 0: no metrics.")
    address: str | None = Field(
        None, description="Address to listen on. Default: 0.0.0.0 on a cluster, 127.0.0.1 with an embedded Ray."
    )
    wait_for_last_scrape_s: float = Field(
        60, ge=0, description="Seconds at most that the end of a run waits for a scraper that has been coming."
    )
