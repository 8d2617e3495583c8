"""One question put to machines of the Ray cluster, each answering for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from cluster import ray_nodes
from trainer.run_directory import Say

_TELL_AFTER_S, _TELL_EVERY_S = 10.0, 60.0
_ALL_ANSWER_S = 3600.0
"""As long as the download of a base may take."""


def ask_node(node: str, question: Callable[..., str], *arguments: Any) -> Any:
    """Ray's reference to what ``question`` will have returned in a process of that node, by its id."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
    return ray.remote(question).options(**options).remote(*arguments)


def answer_of(reference: Any) -> str:
    """Of a question that is answered: what it returned, or raised. Raises RayError where its node is gone."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return str(ray.get(reference))
    except RayTaskError as error:
        return str(error.cause)


def ask_nodes(
    nodes: Iterable[str], question: Callable[..., str], *arguments: Any, about: str, say: Say
) -> dict[str, str]:
    """What ``question`` returns in a process of each of these nodes. One that goes meanwhile is left out.

    Args:
        nodes: their ids.
        about: what is asked, for whom this takes long.
    """
    import ray
    from ray.exceptions import RayError

    addresses = ray_nodes.addresses()
    asked = {ask_node(node, question, *arguments): node for node in nodes}
    answers: dict[str, str] = {}
    began = told = time.monotonic()
    while asked and time.monotonic() - began < _ALL_ANSWER_S:
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=1)
        for reference in done:
            node = asked.pop(reference)
            try:
                answers[node] = answer_of(reference)
            except RayError as error:
                say(f"{addresses[node]} could not be asked for {about}: {str(error).splitlines()[0]}")
        now = time.monotonic()
        if asked and now - began > _TELL_AFTER_S and (told == began or now - told > _TELL_EVERY_S):
            told = now
            say(f"waiting for {', '.join(addresses[node] for node in asked.values())} to look for {about}")
    return answers | dict.fromkeys(asked.values(), f"no answer in {_ALL_ANSWER_S:g} s")
