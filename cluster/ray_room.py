"""Where on the Ray cluster workers have a place, and how many."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from cluster import ray_nodes
from cluster.config import ClusterConfig, WorkerBounds
from cluster.launcher import NEW, Past
from cluster.local_processes import NO_MORE_GPUS
from cluster.ray_reach import Reach
from data_shards.errors import BadInput
from trainer.config import WorkerSpec
from trainer.run_directory import Say

_NODE_ID = "ray.io/node-id"
_TELL_AFTER_S = 5.0
_LOOK_S, _CAPACITY_LOOK_S = 1.0, 0.5
_PLACE_S = 10.0
"""For Ray to place workers that fit."""


class Room:
    """For the workers of one submission."""

    def __init__(self, config: ClusterConfig, *, others_may_join: bool = True) -> None:
        self._config = config
        self._others_may_join = others_may_join
        self._reach: Reach | None = None
        self._past = NEW
        self.use_gpu = False

    @property
    def bundle(self) -> ray_nodes.Resources:
        """What each worker takes."""
        return {"CPU": self._config.cpus_per_worker} | ({"GPU": 1.0} if self.use_gpu else {})

    def check_capacity(self, say: Say, past: Past) -> None:
        """As ``WorkerLauncher.check_capacity``. Waits ``wait_for_capacity_s`` for nodes that may still be joining, also
        for a first one with GPUs, where it is not said whether to use them."""
        self._past = past
        deadline = time.monotonic() + self._config.wait_for_capacity_s
        if self._is_settled():
            return
        if not self._others_may_join:
            raise self._refusal()
        wanted = "a node with a GPU (cluster.use_gpu=false: none is needed)" if self._is_enough() else self._needs()
        say(f"waiting {self._config.wait_for_capacity_s:g} s (cluster.wait_for_capacity_s) for {wanted}")
        # An autoscaler sees the need, where it is known of what: it would else bring machines that are of no use.
        with nullcontext() if self._said is None else self._asked_for(self._config.min_workers, frozenset()):
            while not self._is_settled():
                if time.monotonic() < deadline:
                    time.sleep(_CAPACITY_LOOK_S)
                elif self._is_enough():
                    return
                else:
                    raise self._refusal()

    def _is_settled(self) -> bool:
        """After a look at the nodes: no node that joins would change what workers take, or that they have a place."""
        has_gpu = any(node.get("GPU", 0) for node in ray_nodes.staying().values())
        self.use_gpu = has_gpu if self._said is None else self._said
        is_known = self.use_gpu or self._said is not None or self._past.on_gpus is not None
        return (is_known or not self._others_may_join) and self._is_enough()

    def _refusal(self) -> BadInput:
        return BadInput(
            f"{self._needs()} can't be placed: the cluster has {self._has()}, room for {self._capacity()}. "
            "Use fewer workers, set cluster.cpus_per_worker lower, or cluster.wait_for_capacity_s higher if nodes are "
            "still to come"
        )

    @property
    def _said(self) -> bool | None:
        """Whether to use GPUs, where the configuration tells, or GPUs that were used."""
        return True if self._config.use_gpu is None and self._past.on_gpus else self._config.use_gpu

    def _is_enough(self) -> bool:
        is_known = self._said is not None or self._past.on_gpus is not None
        may_wait = self._past.has_begun and is_known and self._others_may_join
        return may_wait or self._capacity() >= self._config.min_workers

    def _capacity(self) -> int:
        """Workers that there would be room for, were nothing taken."""
        return ray_nodes.bundles_that_fit(ray_nodes.staying().values(), self.bundle)

    def check_reach(self, spec: WorkerSpec, say: Say) -> None:
        """As ``WorkerLauncher.check_reach``; machines that join later are asked as they come."""
        self._reach = Reach(spec, say)
        self._reach.check(self._large_enough())

    def free(self) -> list[ray_nodes.Resources]:
        """What nobody uses on the machines that may get workers."""
        fit = self._fit()
        return [has for node, has in ray_nodes.free().items() if node in fit]

    def more(self, num_workers: int) -> int:
        """How many workers could be placed now beside so many that have their place, by ``cluster.workers.max``."""
        lacking = self._config.num_workers - num_workers
        return min(lacking, ray_nodes.bundles_that_fit(self.free(), self.bundle)) if lacking > 0 else 0

    def label_selector(self) -> dict[str, str] | None:
        """Ray's, of the machines that may get workers. They are named, not those that may not: more may join before the
        workers have their place. None: all."""
        return {_NODE_ID: f"in({','.join(sorted(self._fit()))})"} if self._reach is not None else None

    def wait(self, cancelled: Callable[[], bool], say: Say) -> int:
        """As ``WorkerLauncher.wait_for_room``. Asks Ray itself, by a placement group like the one that the workers will
        get: so it counts what is taken by others, and an autoscaler sees the demand. Where fewer workers may do, as
        many as then fit are taken after a while."""
        bounds, most = self._config.workers, self._config.num_workers
        started, told = time.monotonic(), False
        while True:
            waited = time.monotonic() - started
            out = self._kept_out(waited)
            with self._asked_for(most, out) as is_there:
                while self._kept_out(waited) == out:
                    if is_there(_LOOK_S):
                        return most
                    waited = time.monotonic() - started
                    if cancelled() or waited > self._config.wait_for_room_s:
                        return 0
                    if bounds and waited > bounds.settle_s and (number := self._fewer(bounds)):
                        return number
                    if waited > _TELL_AFTER_S and not told:
                        told = True
                        self._tell_waiting(say)

    def _kept_out(self, waited: float) -> frozenset[str]:
        """Machines that are not asked for. Those that have joined, and have not answered yet, are: else an autoscaler
        would bring others in their stead. Not where fewer workers may begin in the meantime."""
        if self._reach is None:
            return frozenset()
        bounds, nodes = self._config.workers, self._large_enough()
        fit, lacking = self._reach.fit(nodes), self._reach.lacking()
        return frozenset(nodes) - fit if bounds and waited > bounds.settle_s else lacking

    def _tell_waiting(self, say: Say) -> None:
        say(
            f"waiting for room: {self._needs()}; the cluster has {self._has()}, part of it perhaps taken. "
            f"Giving up after {self._config.wait_for_room_s:g} s (cluster.wait_for_room_s)"
        )

    def _fewer(self, bounds: WorkerBounds) -> int:
        """The workers that can be placed now; 0 where that is less than the least."""
        number = self.more(0)
        if number < bounds.min:
            return 0
        with self._asked_for(number, frozenset(self._large_enough()) - self._fit()) as is_there:
            return number if is_there(_PLACE_S) else 0

    @contextmanager
    def _asked_for(self, num_workers: int, out: frozenset[str]) -> Iterator[Callable[[float], bool]]:
        """What says, after so many seconds at most, whether these workers have their place, on none of those machines
        and on none that may not get workers."""
        from ray.util import placement_group, placement_group_table, remove_placement_group

        where = [{_NODE_ID: f"!in({','.join(sorted(out))})"}] * num_workers if out else None
        group = placement_group([self.bundle] * num_workers, strategy="PACK", bundle_label_selector=where)

        def is_there(seconds: float) -> bool:
            if not group.wait(seconds):
                return False
            if self._reach is None or set(placement_group_table(group)["bundles_to_node_id"].values()) <= self._fit():
                return True
            time.sleep(_LOOK_S)  # it holds its place on a machine that has yet to answer
            return False

        try:
            yield is_there
        finally:
            remove_placement_group(group)

    def _fit(self) -> frozenset[str]:
        """The machines that may get workers."""
        nodes = self._large_enough()
        return self._reach.fit(nodes) if self._reach is not None else frozenset(nodes)

    def _large_enough(self) -> list[str]:
        """For a worker at least, were they empty."""
        return [node for node, has in ray_nodes.staying().items() if ray_nodes.bundles_that_fit([has], self.bundle)]

    def _needs(self) -> str:
        per_worker = " and ".join(f"{amount:g} {name}" for name, amount in self.bundle.items())
        bounds = self._config.workers
        name, number = ("workers.min", bounds.min) if bounds else ("num_workers", self._config.num_workers)
        gpus = f" ({NO_MORE_GPUS})" if self._past.on_gpus and self._config.use_gpu is None else ""
        return f"cluster.{name}={number} with {per_worker} each{gpus}"

    def _has(self) -> str:
        lacking = self._reach.lacking() if self._reach is not None else ()
        staying = [has for node, has in ray_nodes.staying().items() if node not in lacking]
        nodes = (f"{has.get('CPU', 0):g} CPU, {has.get('GPU', 0):g} GPU" for has in staying)
        return "; ".join(nodes) or "no node"

    def close(self) -> None:
        if self._reach is not None:
            self._reach.close()
