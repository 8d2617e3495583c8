"""Do all machines that may get workers see the run, its data and its base? Asked before one is taken."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from cluster.ray_ask import ask_nodes
from data_shards.errors import BadInput
from data_shards.storage import Storage
from trainer.config import WorkerSpec
from trainer.reach import Needs, find_out_of_reach
from trainer.run_directory import Say


def check_reach(nodes: Sequence[str], spec: WorkerSpec, say: Say) -> None:
    """Each node, by its id, looks for itself; the driver's own need not, it has seen all of it. A base from the hub is
    downloaded to all of them meanwhile.

    Raises BadInput, naming the machines and what they lack.
    """
    import ray

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in nodes if node != here]
    if not others:
        return
    run, mark = Storage.at(spec.run_uri), f"reach-{uuid.uuid4().hex[:12]}"
    run.write(mark, [b""])
    try:
        answers = ask_nodes(
            others, find_out_of_reach, Needs.of(spec, mark), about="the run, its data and base", say=say
        )
    finally:
        run.delete_file(mark)
    lacking = [f"  {address}: {answer}" for address, answer in sorted(answers.items()) if answer]
    if lacking:
        listing = "\n".join(lacking)
        raise BadInput(
            f"{len(lacking)} of {len(others)} machines lack what their workers would need, and none was taken:\n"
            f"{listing}\nAll must see the same at run.storage, data.prepared and model.base: a file system that all "
            "mount, s3://… or gs://… (for the former two), or a model of the hub; and each needs the credentials"
        )
