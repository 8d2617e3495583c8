"""Runs a function on W gloo workers, forked from one pre-imported process so that a test costs seconds.

Python's own fork server does it: it imports the libraries once, before any process group or OpenMP use, and every
worker is a fork of it.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from cluster.local_processes import PRELOAD, free_port

_MODULES = (
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.mistral.modeling_mistral",
    "trainer.engine",
    "trainer.model",
    "tests.support.warm",
)

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PRELOAD, *_MODULES])


def _worker(
    results: Any,
    rank: int,
    world_size: int,
    port: int,
    threads: int,
    function: Callable[..., Any],
    args: tuple,
    then_killed: bool,
) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    try:
        import torch
        import torch.distributed as dist

        from trainer.process_group import start_process_group

        torch.set_num_threads(threads)
        start_process_group()
        value = function(*args)
        # As bytes: a tensor put into a queue is shared memory, gone with the process that made it.
        results.put((rank, True, pickle.dumps(value)))
        if then_killed:
            results.close()
            results.join_thread()  # it is on its way
            os.kill(os.getpid(), signal.SIGKILL)
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))


def run_workers(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 240,
    threads: int = 1,
    then_killed: bool = False,
) -> list[Any]:
    """Results of ``function(*args)`` from every rank, in order. ``function`` must be importable (top level).

    Args:
        then_killed: each worker is killed as soon as it has told its result, whatever else it is doing.

    Raises AssertionError with the traceback of the first rank that failed.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for the server: DeepSpeed looks when it is imported
    results = _context.Queue()
    port = free_port()
    workers = [
        _context.Process(
            target=_worker, args=(results, rank, world_size, port, threads, function, args, then_killed), daemon=True
        )
        for rank in range(world_size)
    ]
    for worker in workers:
        worker.start()
    by_rank: dict[int, Any] = {}
    try:
        for _ in workers:
            rank, fine, value = results.get(timeout=timeout_s)
            assert fine, f"rank {rank} of {world_size} failed:\n{value}"
            by_rank[rank] = pickle.loads(value)
    finally:
        for worker in workers:
            worker.join(timeout=10 if len(by_rank) == world_size else 0.1)
            if worker.is_alive():
                worker.kill()
    assert all(worker.exitcode == (-signal.SIGKILL if then_killed else 0) for worker in workers)
    return [by_rank[rank] for rank in range(world_size)]


def start_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """One more fork of the pre-imported process, running, for a test to kill."""
    process = _context.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def new_queue() -> Any:
    """For what such a process has to tell."""
    return _context.Queue()


@contextmanager
def process_of_its_own(initializer: Callable[[], None] | None = None) -> Iterator[Callable[..., Any]]:
    """Calls functions in one more fork of the pre-imported process: a driver of Ray, which Ray may abort."""
    with ProcessPoolExecutor(1, mp_context=_context, initializer=initializer) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=240)
