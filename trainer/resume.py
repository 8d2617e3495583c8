"""What an attempt begins with: the run's own checkpoint, or the weights of another run's."""

from __future__ import annotations

import time

from data_shards.errors import CorruptFile
from data_shards.storage import Storage
from trainer import checkpoint
from trainer.base_identity import refuse_other_base
from trainer.checkpoint import CheckpointRef
from trainer.config import Method, WorkerSpec
from trainer.engine import ZeroEngine
from trainer.errors import CheckpointCorrupt, CheckpointOutOfReach, ModelError
from trainer.fast_tier import bring_together
from trainer.run_directory import RunDirectory
from trainer.staging import Staging

_PATIENCE_S, _PAUSE_S = 10.0, 0.5
"""A file system over the network may show another node's file a few seconds late."""


def find_resumed(run: RunDirectory, spec: WorkerSpec, patience_s: float = _PATIENCE_S) -> CheckpointRef | None:
    """The run's own checkpoint that the attempt continues from, within every rank's reach; before the model is built,
    as the next attempt may have to take another one. Collective.

    Args:
        patience_s: for which it is looked for: the driver has seen it, and an attempt that finds it gone passes it over
            for good, of the fast tier with all older ones.

    Raises ModelError where it was trained from another base, CheckpointUnusable where it can't be read.
    """
    if spec.resume_from is None:
        return None
    try:
        ref = _manifest_seen(run.checkpoints, spec.resume_from, patience_s)
    except FileNotFoundError as error:  # a worker of an attempt before this one went on, and removed it
        raise CheckpointOutOfReach(spec.resume_from, "it is not there any more") from error
    except CorruptFile as error:  # since the driver looked
        raise CheckpointCorrupt(spec.resume_from, str(error)) from error
    _check_base(spec, ref)
    if ref.manifest.fast:
        bring_together(run.checkpoints, ref)
    return ref


def _manifest_seen(checkpoints: Storage, name: str, patience_s: float) -> CheckpointRef:
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return checkpoint.read_manifest(checkpoints, name)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
        time.sleep(_PAUSE_S)


def restore(
    engine: ZeroEngine, run: RunDirectory, spec: WorkerSpec, staging: Staging, resumed: CheckpointRef | None
) -> None:
    """Load what the attempt begins with."""
    if resumed is not None:
        checkpoint.load(engine, run.checkpoints, resumed, staging)
    elif spec.init_from is not None:
        source, name = Storage.holding(spec.init_from)
        ref = checkpoint.read_manifest(source, name)
        if spec.trainer.training.method == Method.LORA:  # a full checkpoint takes the base's place altogether
            _check_base(spec, ref)
        try:
            checkpoint.load(engine, source, ref, staging, weights_only=True)
        except CheckpointCorrupt as error:  # not one of this run's, so nothing else can take its place
            raise ModelError(f"init_from={spec.init_from}: {error}; `baton checkpoints verify` tells more") from error


def _check_base(spec: WorkerSpec, ref: CheckpointRef) -> None:
    if not spec.other_base:
        refuse_other_base(spec.base_identity, ref.name, ref.manifest.base)
