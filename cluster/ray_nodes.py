"""The Ray cluster's machines: what they have, what of it is free, and which of them will be taken away.

Ray Train watches for drains, too, but tells only workers that ask in a barrier; the driver has to know, to ask for a
save and to place the next attempt elsewhere. The calls are Ray's own (``ray/_private/state.py``, ``ray drain-node``);
there are no public ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

Resources = dict[str, float]


def bundles_that_fit(nodes: Iterable[Resources], bundle: Resources) -> int:
    """How many workers the nodes hold together; a worker lies on one node (pure)."""
    wanted = {name: amount for name, amount in bundle.items() if amount > 0}
    return sum(int(min(node.get(name, 0.0) / amount for name, amount in wanted.items())) for node in nodes)


def draining() -> dict[str, float | None]:
    """By node id, the Unix seconds at which it will be gone; None where nobody said."""
    import ray

    found = ray._private.state.state.get_draining_nodes() or {}
    return {node: milliseconds / 1000 if milliseconds else None for node, milliseconds in found.items()}


def staying() -> dict[str, Resources]:
    """By node id, what those machines have that are alive and will not be taken away."""
    import ray

    leaving = draining()
    return {
        node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving
    }


def free() -> dict[str, Resources]:
    """By node id, what nobody uses on those machines, as far as Ray has heard of it."""
    import ray

    available = ray._private.state.available_resources_per_node()
    return {node: available[node] for node in staying() if node in available}


def addresses() -> dict[str, str]:
    """By node id, also of nodes that are gone."""
    import ray

    return {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes()}


def find(name: str) -> str | None:
    """The id of the living node that has this id, address or host name."""
    import ray

    for node in ray.nodes():
        if node["Alive"] and name in (node["NodeID"], node["NodeManagerAddress"], node["NodeManagerHostname"]):
            return str(node["NodeID"])
    return None


def drain(node: str, reason: str, deadline: float | None) -> bool:
    """Have Ray place nothing on a node any more. Whoever takes the machine away ends it. Returns whether Ray agreed."""
    import ray
    from ray.core.generated import autoscaler_pb2

    client: Any = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    preemption = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    milliseconds = int(1000 * max(deadline, time.time())) if deadline is not None else 0
    accepted, _ = client.drain_node(node, preemption, reason, milliseconds)
    return bool(accepted)
