"""Ray Train's workers as supervisors: each runs its rank of one attempt after another in a process of its own.

To start Ray Train's workers takes many seconds: a controller, a placement group, fresh processes, imports. So they
stay while attempts fail under them. What died, hung or ran out of memory is a child, which its supervisor can always
end. The next attempt's child is a fork of a process that has imported the libraries (afresh where there are GPUs, as
CUDA does not survive a fork). Only when a node is lost or drains, or the number of workers changes, Ray Train starts
anew.

A ``_Board``, an actor beside the driver, passes on what attempt is to be run, where its rank 0 listens, and how each
rank's process ended.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from cluster.local_processes import GRACE_S, KILL_S, describe, free_port_at, run_rank, start_method
from trainer import oom_kills
from trainer.config import WorkerSpec
from trainer.metrics import MetricsSink, Report

_LOOK_S = 0.1
_ANSWER_S = 60.0
"""For the board to answer; it does nothing else."""
_STAYS = "could not be ended"


class Order(NamedTuple):
    """An attempt to run."""

    number: int
    """1 for the session's first"""
    spec: dict[str, Any]
    metrics: MetricsSink


class _Board:
    """The actor; its methods are coroutines, so that many may wait in it."""

    def __init__(self) -> None:
        self._order: Order | None = None
        self._closed = False
        self._address: dict[int, str] = {}
        self._ends: dict[int, dict[int, str]] = {}
        self._cut_off = 0
        self._changed = asyncio.Event()
        self.nodes: dict[int, str] = {}

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def post(self, order: Order) -> None:
        self._order = order
        self._tell()

    async def close(self) -> None:
        self._closed = True
        self._tell()

    async def next(self, rank: int, node: str, after: int) -> Order | None:
        """The order that comes after that one; None once there will be none."""
        self.nodes[rank] = node
        while not self._closed and (self._order is None or self._order.number <= after):
            await self._changed.wait()
        return None if self._closed else self._order

    async def listen(self, number: int, address: str) -> None:
        self._address[number] = address
        self._tell()

    async def address(self, number: int) -> str:
        """``host:port`` of an order's rank 0."""
        while number not in self._address:
            await self._changed.wait()
        return self._address[number]

    async def ended(self, number: int, rank: int, how: str) -> None:
        """``how``: empty where its process has ended well."""
        self._ends.setdefault(number, {})[rank] = how

    async def ends(self, number: int) -> dict[int, str]:
        return self._ends.get(number, {})

    async def cut_off(self, number: int) -> None:
        """Have what still runs of an order be killed."""
        self._cut_off = number

    async def is_cut_off(self, number: int) -> bool:
        return self._closed or number <= self._cut_off

    async def where(self) -> dict[int, str]:
        return self.nodes


def supervise(arguments: Mapping[str, Any]) -> None:
    """Ray Train's train function: orders, until there are no more."""
    import ray
    import ray.train

    context = ray.train.get_context()
    rank, node, board = context.get_world_rank(), ray.get_runtime_context().get_node_id(), arguments["board"]
    host = ray.util.get_node_ip_address()
    number = 0
    while (order := ray.get(board.next.remote(rank, node, number))) is not None:
        number = order.number
        if rank == 0:
            ray.get(board.listen.remote(number, f"{host}:{free_port_at(host)}"))
        address, _, port = ray.get(board.address.remote(number)).rpartition(":")
        environment = dict(os.environ) | {
            "RANK": str(rank),
            "LOCAL_RANK": str(context.get_local_rank()),
            "WORLD_SIZE": str(context.get_world_size()),
            "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
            "BATON_NODE_ID": node,
        }
        if given := environment.get("CUDA_VISIBLE_DEVICES"):
            environment["BATON_GPUS_GIVEN"] = given
        how = _run_child(order, environment, board)
        ray.get(board.ended.remote(number, rank, how))


def _run_child(order: Order, environment: Mapping[str, str], board: Any) -> str:
    """How a rank's process ended; empty: well."""
    import ray

    context = start_method(environment.get("CUDA_VISIBLE_DEVICES", "") != "")
    reports, sending = context.Pipe(duplex=False)
    child = context.Process(target=run_rank, args=(order.spec, dict(environment), _PipeSink(sending)))
    kills_before = oom_kills.count()
    with _without_main_file():
        child.start()
    sending.close()
    relay = threading.Thread(target=_relay, args=(reports, order.metrics), daemon=True, name="metrics-relay")
    relay.start()
    asked = time.monotonic()
    while child.exitcode is None:
        child.join(_LOOK_S)
        if time.monotonic() - asked > 5 * _LOOK_S:
            asked = time.monotonic()
            if ray.get(board.is_cut_off.remote(order.number), timeout=_ANSWER_S):
                child.kill()
                child.join(KILL_S)
                break
    relay.join(5)
    if child.exitcode is None:
        return f"{_STAYS}: process {child.pid} outlives SIGKILL"
    if not child.exitcode:
        return ""
    return "; ".join(filter(None, [describe(child.exitcode), oom_kills.told(kills_before)]))


@contextmanager
def _without_main_file() -> Iterator[None]:
    """Else the child would import Ray's worker script anew, and with it Ray."""
    main = sys.modules["__main__"].__dict__
    file, spec = main.pop("__file__", None), main.get("__spec__")
    main["__spec__"] = None
    try:
        yield
    finally:
        main["__spec__"] = spec
        if file is not None:
            main["__file__"] = file


def _relay(reports: Connection, sink: MetricsSink) -> None:
    with suppress(EOFError, OSError):
        while True:
            sink.send(pickle.loads(reports.recv_bytes()))


class _PipeSink:
    """Hands reports to the supervisor, which is connected to Ray."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def send(self, report: Report) -> None:
        with suppress(OSError, ValueError):
            self._pipe.send_bytes(pickle.dumps(report))


class Session:
    """Supervisors on so many workers, as the driver sees them."""

    def __init__(self, board: Any, num_workers: int, fit: Future[Any]) -> None:
        """
        Args:
            fit: of Ray Train, which lasts as long as the session.
        """
        self._board = board
        self._fit = fit
        self.num_workers = num_workers
        self.lost = False
        """whether a supervisor no longer answers, or a rank could not be ended"""
        self._orders = 0

    @property
    def is_alive(self) -> bool:
        return not self._fit.done() and not self.lost

    def nodes(self) -> set[str]:
        """On which there are supervisors."""
        return set(self._ask("where").values())

    def run(self, spec: WorkerSpec, metrics: MetricsSink) -> str:
        """One attempt; returns what was lost of it. Raises what Ray Train ended with, if it did."""
        self._orders += 1
        number = self._orders
        self._ask("post", Order(number, spec.model_dump(mode="json"), metrics))
        failed_at: float | None = None
        while True:
            if self._fit.done():
                self._fit.result()
                return "Ray Train's workers have ended"
            ends: dict[int, str] = self._ask("ends", number)
            if len(ends) == self.num_workers:
                break
            if failed_at is None and any(ends.values()):
                failed_at = time.monotonic()
            waited = time.monotonic() - failed_at if failed_at is not None else 0.0
            if waited > GRACE_S + 2 * KILL_S:
                ends |= dict.fromkeys(set(range(self.num_workers)) - set(ends), "has told nothing since it was cut off")
                self.lost = True
                break
            if waited > GRACE_S:
                self._ask("cut_off", number)
            time.sleep(_LOOK_S)
        if any(how.startswith(_STAYS) for how in ends.values()):  # it holds its GPU
            self.lost = True
        return "; ".join(f"rank {rank} {how}" for rank, how in sorted(ends.items()) if how)

    def close(self) -> None:
        """The supervisors end, and with them Ray Train."""
        import ray
        from ray.exceptions import RayError

        with suppress(RayError, TimeoutError):
            self._ask("close")
        with suppress(Exception):  # it has ended, one way or the other
            self._fit.result(_ANSWER_S)
        with suppress(RayError):
            ray.kill(self._board)

    def _ask(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._board, method).remote(*arguments), timeout=_ANSWER_S)


def open_board() -> Any:
    """The actor, on the driver's node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, max_concurrency=10_000, scheduling_strategy=here)(_Board).remote()
