"""Preparing spread over a Ray cluster: each task of the corpus is one of Ray's, writing straight to the storage.

The bytes are those of a local ``prepare``; the same receipts say what is done, so either goes on where the other was
killed.
"""

from __future__ import annotations

from collections.abc import Sequence

from data_shards.batch_encoder import audit_limits
from data_shards.config import DataConfig
from data_shards.encode import Encoder
from data_shards.errors import BadInput, BatonError
from data_shards.prepare import Report, write_tasks
from data_shards.storage import Storage
from data_shards.windows import Receipt, Task, is_done, read_receipts

_TRIES = 3
"""Of a task whose node is lost; what it had committed is kept."""


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
    running = {run.remote(task, shared, location.uri): task for task in open_tasks}
    report(f"data: {len(open_tasks)} tasks on {len(ray.nodes())} nodes")
    try:
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            ray.get(done)
            task = running.pop(done)
            report(f"data: {len(open_tasks) - len(running)} of {len(open_tasks)} tasks done; {task.files[0].uri}")
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise BatonError(f"preparing on the Ray cluster failed: {error}. What was committed is kept") from error
    finally:
        for left in running:
            ray.cancel(left)
    receipts.clear()
    receipts.update(read_receipts(location, limits))


def _run(task: Task, shared: tuple[DataConfig, Encoder], uri: str) -> None:
    config, encoder = shared
    location = Storage.at(uri)
    receipts = read_receipts(location, audit_limits(config))  # a first try of this task may have left some
    write_tasks([task], config, encoder, location, receipts, lambda line: None)
