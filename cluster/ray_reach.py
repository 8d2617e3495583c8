"""Do all machines that may get workers see the run, its data and its base? Asked before one is taken."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from cluster import ray_nodes
from cluster.ray_ask import answer_of, ask_node, ask_nodes
from data_shards.errors import BadInput
from data_shards.storage import Storage
from trainer.config import WorkerSpec
from trainer.reach import Needs, find_out_of_reach
from trainer.run_directory import Say

log = logging.getLogger(__name__)

_ASK_AGAIN_S = 60.0
"""After which a machine that lacked something is asked again: a mount may be late."""
_TELL_AFTER_S = 30.0


@dataclass
class _Newcomer:
    """A machine that joined after the start, of which it is not known that it has what workers need."""

    address: str
    lacks: str = ""
    """what it answered last; empty before it has"""
    answered_at: float = 0.0
    asked_at: float = 0.0
    reference: Any = None
    """Ray's, to the answer that is waited for"""
    told: bool = False
    """that it is waited for"""


class Reach:
    """Of the machines of the cluster: which have what the workers of ``spec`` need.

    At the start all must; the driver's own need not be asked, it has seen all of it. One that joins later gets no
    worker before it has answered, and while it lacks something: a spot machine without its mount does not end a run.
    """

    def __init__(self, spec: WorkerSpec, say: Say) -> None:
        self._spec = spec
        self._say = say
        self._run = Storage.at(spec.run_uri)
        self._needs: Needs | None = None
        self._fit: set[str] = set()
        self._newcomers: dict[str, _Newcomer] = {}
        self._looking = threading.Lock()

    def check(self, nodes: Collection[str]) -> None:
        """Each of these, by its id, looks for itself. A base from the hub is downloaded to all of them meanwhile.

        Raises BadInput, naming the machines and what they lack.
        """
        import ray

        self._fit.add(str(ray.get_runtime_context().get_node_id()))
        others = sorted(set(nodes) - self._fit)
        if not others:
            return
        needs = self._needs_marked()
        answers = ask_nodes(others, find_out_of_reach, needs, about="the run, its data and base", say=self._say)
        addresses = ray_nodes.addresses()
        lacking = sorted(f"  {addresses[node]}: {answer}" for node, answer in answers.items() if answer)
        if lacking:
            listing = "\n".join(lacking)
            raise BadInput(
                f"{len(lacking)} of {len(others)} machines lack what their workers would need, and none was taken:\n"
                f"{listing}\nAll must see the same at run.storage, data.prepared and model.base: a file system that "
                "all mount, s3://… or gs://… (for the former two), or a model of the hub; and each needs the "
                "credentials"
            )
        self._fit.update(answers)

    def fit(self, nodes: Collection[str]) -> frozenset[str]:
        """Those of these machines that may get workers. Does not wait for answers."""
        with self._looking:
            for node in set(nodes) - self._fit:
                try:
                    self._look_at(node)
                except OSError as error:  # of the storage; the next look may find it well
                    log.warning("nodes that joined could not be asked for what workers need: %s", error)
                    break
            return frozenset(nodes) & self._fit

    def lacking(self) -> frozenset[str]:
        """Those that have answered that they lack something."""
        with self._looking:
            return frozenset(node for node, it in self._newcomers.items() if it.lacks)

    def _look_at(self, node: str) -> None:
        it = self._newcomers.get(node)
        if it is None:
            it = self._newcomers[node] = _Newcomer(ray_nodes.addresses().get(node, node))
        now = time.monotonic()
        if it.reference is None:
            if not it.lacks or now - it.answered_at > _ASK_AGAIN_S:
                self._ask(node, it)
            return
        if not _is_answered(it.reference):
            if now - it.asked_at > _TELL_AFTER_S and not it.told:
                it.told = True
                self._say(f"{it.address} has joined; it gets workers once it has found the run, its data and base")
            return
        answer = _answer(it.reference)
        it.reference, it.answered_at = None, now
        if not answer:
            self._fit.add(node)
            del self._newcomers[node]
        if answer != it.lacks:
            it.lacks = answer
            told = f"gets no workers: {answer}" if answer else "now has what workers need"
            self._say(f"{it.address} {told}")

    def _ask(self, node: str, it: _Newcomer) -> None:
        it.reference = ask_node(node, find_out_of_reach, self._needs_marked())
        it.asked_at, it.told = time.monotonic(), False

    def _needs_marked(self) -> Needs:
        """With a mark of this launcher's own beside the run, by which the place is known."""
        if self._needs is None:
            needs = Needs.of(self._spec, f"reach-{uuid.uuid4().hex[:12]}")
            self._run.write(needs.mark, [b""])
            self._needs = needs
        return self._needs

    def close(self) -> None:
        """What was not answered is not waited for."""
        if self._needs is not None:
            with suppress(OSError):
                self._run.delete_file(self._needs.mark)


def _is_answered(reference: Any) -> bool:
    import ray

    done, _ = ray.wait([reference], timeout=0)
    return bool(done)


def _answer(reference: Any) -> str:
    from ray.exceptions import RayError

    try:
        return answer_of(reference)
    except RayError as error:
        return f"it could not be asked for what they need: {str(error).splitlines()[0]}"
