"""One question put to machines of the Ray cluster, each answering for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from trainer.run_directory import Say

_TELL_AFTER_S, _TELL_EVERY_S = 10.0, 60.0
_ALL_ANSWER_S = 3600.0
"""As long as the download of a base may take."""


def ask_nodes(
    nodes: Iterable[str], question: Callable[..., str], *arguments: Any, about: str, say: Say
) -> dict[str, str]:
    """What ``question`` returns in a process of each of these nodes, by address. One that goes meanwhile is left out.

    Args:
        nodes: their ids.
        about: what is asked, for whom this takes long.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    addresses = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes()}
    remote = ray.remote(question)
    asked = {
        remote.options(
            num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(*arguments): node
        for node in nodes
    }
    answers: dict[str, str] = {}
    began = told = time.monotonic()
    while asked and time.monotonic() - began < _ALL_ANSWER_S:
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=1)
        for reference in done:
            address = addresses[asked.pop(reference)]
            try:
                answers[address] = ray.get(reference)
            except RayTaskError as error:
                answers[address] = str(error.cause)
            except RayError as error:
                say(f"{address} could not be asked for {about}: {str(error).splitlines()[0]}")
        now = time.monotonic()
        if asked and now - began > _TELL_AFTER_S and (told == began or now - told > _TELL_EVERY_S):
            told = now
            say(f"waiting for {', '.join(addresses[node] for node in asked.values())} to look for {about}")
    return answers | {addresses[node]: f"no answer in {_ALL_ANSWER_S:g} s" for node in asked.values()}
