"""Preparing by tasks of a Ray cluster, on processors alone: each task of the corpus is one of Ray's, writing straight
to the storage.

The bytes are those of a local ``prepare``; the same receipts say what is done, so either goes on where the other was
killed.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cluster import ray_nodes
from cluster.ray_ask import ask_nodes
from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder
from data_shards.errors import BatonError
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
_TELL_EVERY_S = 60.0


def write_tasks_on_ray(
    tasks: Sequence[Task],
    config: DataConfig,
    encoder: Encoder,
    location: Storage,
    receipts: dict[int, list[Receipt]],
    report: Report,
) -> None:
    """As ``write_tasks``. Ray is connected by the caller; sources and storage must be seen from all of its nodes.

    To find repeated records one writer must see all: then the whole is one task of Ray's.

    Raises what a task raised, DataError with file and line above all; BatonError where its nodes were lost again and
    again.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    limits = audit_limits(config)
    open_tasks = [task for task in tasks if not is_done(receipts.get(task.number, []))]
    shared = ray.put((config.model_copy(update={"processes": 1}), encoder))
    run = ray.remote(_run).options(num_cpus=1, max_retries=_TRIES - 1)
    num_done = 0
    groups = [open_tasks] if config.cleaning.deduplicate and open_tasks else [[task] for task in open_tasks]
    waiting, running = iter(groups), dict[Any, list[Task]]()
    report(f"data: {len(groups)} tasks for the processors of {len(ray_nodes.staying())} nodes")
    try:
        while num_done < len(groups):
            at_once = _ASKED_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 0)))
            for group in islice(waiting, max(0, at_once - len(running))):
                running[run.remote(group, shared, location.uri)] = group
            done, _ = ray.wait(list(running), num_returns=1, timeout=_TELL_EVERY_S)
            if not done:
                report(f"data: {num_done} of {len(groups)} tasks done; {_free_processors()}")
            for reference in done:
                ray.get(reference)
                group, num_done = running.pop(reference), num_done + 1
                report(f"data: {num_done} of {len(groups)} tasks done; {group[0].files[0].uri}")
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


def _free_processors() -> str:
    free = sum(node.get("CPU", 0) for node in ray_nodes.free().values())
    return f"{free:g} processors of the cluster are free" + ("" if free else ", tasks may be waiting for others' work")


def _run(tasks: list[Task], shared: tuple[DataConfig, Encoder], uri: str) -> None:
    config, encoder = shared
    location = Storage.at(uri)
    receipts = read_receipts(location, audit_limits(config))  # a first try of these tasks may have left some
    write_tasks(tasks, config, encoder, location, receipts, lambda line: None)


def write_tasks_where_they_can_be(
    tasks: Sequence[Task],
    config: DataConfig,
    encoder: Encoder,
    location: Storage,
    receipts: dict[int, list[Receipt]],
    report: Report,
) -> None:
    """On the cluster, if all of its processors see sources and storage; else by the driver, saying why."""
    why_not = _why_not_on_ray(tasks, location, report)
    if why_not:
        report(f"data: prepared where the driver runs ({why_not})")
    write = write_tasks if why_not else write_tasks_on_ray
    write(tasks, config, encoder, location, receipts, report)


def _why_not_on_ray(tasks: Sequence[Task], location: Storage, report: Report) -> str:
    """Empty where nothing speaks against it."""
    nodes = [node for node, has in ray_nodes.staying().items() if has.get("CPU")]
    mark = f"seen-{uuid.uuid4().hex[:12]}"
    location.write(mark, [b""])
    files = {file.uri: file.size for task in tasks for file in task.files if "://" not in file.uri}
    try:
        answers = ask_nodes(nodes, _find_unseen, files, location.uri, mark, about="the sources", say=report)
    finally:
        location.delete_file(mark)
    if not answers:
        return "no node has processors"
    addresses = ray_nodes.addresses()
    return min((f"{addresses[node]} {answer}" for node, answer in answers.items() if answer), default="")


def _find_unseen(files: dict[str, int], uri: str, mark: str) -> str:
    """``files``: sizes by path."""
    for path, size in files.items():
        found = Path(path).expanduser()
        if not found.is_file() or found.stat().st_size != size:
            return f"does not see {path}"
    return "" if Storage.at(uri).exists(mark) else f"does not see {uri}"
