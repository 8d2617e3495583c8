"""Preparing spread over a Ray cluster: each task of the corpus is one of Ray's, writing straight to the storage.

The bytes are those of a local ``prepare``; the same receipts say what is done, so either goes on where the other was
killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder
from data_shards.errors import BadInput, BatonError
from data_shards.prepare import Report, write_tasks
from data_shards.storage import Storage
from data_shards.writing.batch_encoder import audit_limits
from data_shards.writing.receipts import Receipt, is_done, read_receipts
from data_shards.writing.tasks import Task

_TRIES = 3
"""Of a task whose node is lost; what it had committed is kept."""
_ASKED_PER_CPU = 2
"""Tasks handed to Ray for each processor of the cluster: more than it can run, so that an autoscaler sees the need, and
few, because they can't be taken back."""


def write_tasks_on_ray(
    tasks: Sequence[Task],
    config: DataConfig,
    encoder: Encoder,
    location: Storage,
    receipts: dict[int, list[Receipt]],
    report: Report,
) -> None:
    """As ``write_tasks``. Ray is connected by the caller; sources and storage must be seen from all of its nodes.

    Raises what a task raised, DataError with file and line above all; BatonError where its nodes were lost again and
    again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    if config.cleaning.deduplicate:
        raise BadInput(
            "data.cleaning.deduplicate needs all records in one place, and data.spread=true sends them to many; "
            "prepare without data.spread, or leave the repeats in (the audit counts them)"
        )
    limits = audit_limits(config)
    open_tasks = [task for task in tasks if not is_done(receipts.get(task.number, []))]
    shared = ray.put((config.model_copy(update={"processes": 1}), encoder))
    run = ray.remote(_run).options(num_cpus=1, max_retries=_TRIES - 1)
    waiting, num_done = iter(open_tasks), 0
    running: dict[Any, Task] = {}
    report(f"data: {len(open_tasks)} tasks on {len(ray.nodes())} nodes")
    try:
        while num_done < len(open_tasks):
            at_once = _ASKED_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0)))
            for task in islice(waiting, max(0, at_once - len(running))):
                running[run.remote(task, shared, location.uri)] = task
            (done,), _ = ray.wait(list(running), num_returns=1)
            ray.get(done)
            task, num_done = running.pop(done), num_done + 1
            report(f"data: {num_done} of {len(open_tasks)} tasks done; {task.files[0].uri}")
    except RayTaskError as error:
        # The others are not cancelled: Ray aborts a driver that cancels a task just as it ends (its pull request
        # 54798 mends one such case of several). They end with the driver, or by themselves.
        raise error.cause from None
    except RayError as error:
        raise BatonError(f"preparing on the Ray cluster failed: {error}. What was committed is kept") from error
    receipts.clear()
    receipts.update(read_receipts(location, limits))
    if not all(is_done(receipts.get(task.number, [])) for task in tasks):
        raise FileNotFoundError(f"{location.uri}: receipts are gone; another job may have finished this dataset")


def _run(task: Task, shared: tuple[DataConfig, Encoder], uri: str) -> None:
    config, encoder = shared
    location = Storage.at(uri)
    receipts = read_receipts(location, audit_limits(config))  # a first try of this task may have left some
    write_tasks([task], config, encoder, location, receipts, lambda line: None)
