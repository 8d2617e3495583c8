"""Is what an attempt needs within this machine's reach? Asked on every machine before a GPU of it is taken.

Nothing here imports torch: the question should be answered at once.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from data_shards.errors import BatonError, DatasetCorrupt
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from trainer.base_location import locate_base, sketch_of
from trainer.config import ModelConfig, WorkerSpec

_PATIENCE_S, _PAUSE_S = 10.0, 0.5
"""A file system over the network may show another machine's file a few seconds late."""


class Needs(NamedTuple):
    """What an attempt needs of a machine."""

    run_uri: str
    mark: str
    """a file below it that was written just now"""
    dataset_uri: str
    fingerprint: str
    model: ModelConfig
    sketch: str
    """of the base, as it is where the driver runs"""
    init_from: str | None

    @classmethod
    def of(cls, spec: WorkerSpec, mark: str) -> Needs:
        """As they are here. Raises ModelError where the base is not even here."""
        model = spec.trainer.model
        sketch = sketch_of(locate_base(model), model)
        return cls(spec.run_uri, mark, spec.dataset_uri, spec.fingerprint, model, sketch, spec.init_from)


def find_out_of_reach(needs: Needs, patience_s: float = _PATIENCE_S) -> str:
    """What this machine lacks; empty: nothing. A base from the hub is downloaded on the way, for workers to find."""
    try:
        return _run_out_of_reach(needs, patience_s) or _data_out_of_reach(needs) or _weights_out_of_reach(needs)
    except DatasetCorrupt as error:
        return error.problem  # from elsewhere it may be well, so no advice to delete it
    except (OSError, BatonError) as error:
        return str(error)


def _run_out_of_reach(needs: Needs, patience_s: float) -> str:
    run, deadline = Storage.at(needs.run_uri), time.monotonic() + patience_s
    while not run.exists(needs.mark):
        if time.monotonic() > deadline:
            return f"{needs.run_uri} is not what the driver sees there (run.storage)"
        time.sleep(_PAUSE_S)
    return ""


def _data_out_of_reach(needs: Needs) -> str:
    dataset = Storage.at(needs.dataset_uri)
    try:
        manifest = read_dataset_manifest(dataset)
    except FileNotFoundError:
        return f"{needs.dataset_uri} is not there (data.prepared)"
    if manifest.fingerprint != needs.fingerprint:
        return f"{needs.dataset_uri} holds other data, {manifest.fingerprint} (data.prepared)"
    for split, entry in manifest.splits.items():
        if entry.rows:
            SplitReader(dataset, manifest, split).pack(0)
    return ""


def _weights_out_of_reach(needs: Needs) -> str:
    base = locate_base(needs.model)
    if sketch_of(base, needs.model) != needs.sketch:
        return f"{base} holds another model than where the driver runs (model.base)"
    if needs.init_from is not None:
        storage, name = Storage.holding(needs.init_from)
        if not storage.sizes(name):
            return f"{needs.init_from} is not there (init_from)"
    return ""
