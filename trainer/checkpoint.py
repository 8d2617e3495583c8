"""Saving and loading the trained state: rank files first, one manifest last, any world size back.

Layout under ``checkpoints/``: ``<step>-<attempt>/rank-00000.safetensors …``, ``receipts/rank-00000.json …`` (how rank 0
learns sizes and hashes, without a collective), ``manifest.json``. No attempt writes into another's directory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from data_shards.errors import BatonError, CorruptFile
from data_shards.storage import FileEntry, Storage, VerifiedReader
from trainer.checkpoint_manifest import MANIFEST, CheckpointManifest, ParameterEntry
from trainer.engine import ZeroEngine
from trainer.errors import CheckpointCorrupt
from trainer.slices import overlaps
from trainer.tensor_files import TensorFile, TensorSpec, write_tensors


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint: its directory's name under ``checkpoints/`` and its manifest."""

    name: str
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        return self.manifest.progress.step


def directory_name(step: int, attempt: str) -> str:
    return f"{step:08d}-{attempt}"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def save(engine: ZeroEngine, checkpoints: Storage, draft: CheckpointManifest) -> CheckpointRef:
    """Write this rank's slices; rank 0 then commits. Collective; returns on every rank after the commit.

    Args:
        draft: the manifest but for ``world_size``, ``parameters``, ``optimizer`` and ``files``.

    Raises:
        BatonError: rank 0 can't see another rank's receipt, so the storage is not shared.
    """
    name = directory_name(draft.progress.step, draft.attempt)
    target = checkpoints.child(name)
    if target.exists(MANIFEST):
        raise BatonError(f"{target.uri} is committed already; an attempt must not write there twice")
    slices = dict(engine.local_slices())
    specs = {key: TensorSpec(tuple(value.shape), value.dtype) for key, value in slices.items()}
    entry = write_tensors(target, rank_file(engine.rank), specs, slices.__getitem__)
    target.write(_receipt(engine.rank), [json.dumps(entry.to_json()).encode()])
    manifest = replace(
        draft,
        world_size=engine.world_size,
        parameters=tuple(ParameterEntry(p.name, p.shape) for p in engine.trained),
        optimizer={**draft.optimizer, "step": engine.optimizer_step(), "state_keys": engine.state_keys()},
        files=(),
    )
    torch.distributed.barrier()
    if engine.rank == 0:
        receipts = [_read_receipt(target, rank) for rank in range(engine.world_size)]
        target.write(MANIFEST, [replace(manifest, files=tuple(receipts)).to_bytes()])
    torch.distributed.barrier()
    return CheckpointRef(name, CheckpointManifest.from_bytes(target.read(MANIFEST), target.uri))


def _receipt(rank: int) -> str:
    return f"receipts/rank-{rank:05d}.json"


def _read_receipt(target: Storage, rank: int) -> FileEntry:
    try:
        return FileEntry.from_json(json.loads(target.read(_receipt(rank))), target.uri_of(_receipt(rank)))
    except FileNotFoundError as error:
        raise BatonError(
            f"{target.uri}: rank 0 does not see what rank {rank} wrote. All nodes must share the storage: set "
            "run.storage to a shared file system or to s3://… or gs://…"
        ) from error


def load(engine: ZeroEngine, checkpoints: Storage, ref: CheckpointRef, *, weights_only: bool = False) -> None:
    """Put a committed checkpoint into a fresh engine of any world size. Each rank reads only the ranges it needs.

    Args:
        weights_only: leave the optimizer fresh, for a new run that begins with another's weights.

    Raises:
        CheckpointCorrupt: a file is missing, cut off, or fails a block hash.
        BatonError: the checkpoint holds other parameters than the engine trains.
    """
    manifest = ref.manifest
    wanted = {entry.name: entry.shape for entry in engine.trained}
    stored = {entry.name: entry.shape for entry in manifest.parameters}
    if wanted != stored:
        different = sorted(wanted.items() ^ stored.items())[:4]
        raise BatonError(f"checkpoint {ref.name} holds other parameters than this model trains: {different}")
    keys = [] if weights_only else list(manifest.optimizer["state_keys"])
    with SliceReader(checkpoints.child(ref.name), ref) as reader:
        slices = {
            f"{entry.name}/{part}": reader.read(entry.name, part, entry.numel, *engine.bounds(entry))
            for entry in engine.trained
            for part in ("fp32", *keys)
        }
    engine.load_local_slices(slices, int(manifest.optimizer["step"]), keys)


class SliceReader:
    """Reads elements of whole parameters out of the rank files of one checkpoint."""

    def __init__(self, directory: Storage, ref: CheckpointRef) -> None:
        self._directory = directory
        self._ref = ref
        self._files: dict[int, TensorFile] = {}

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, name: str, part: str, numel: int, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` of the flattened parameter: fp32 ``[stop - start]``."""
        result = torch.empty(stop - start, dtype=torch.float32)
        try:
            for piece in overlaps(numel, self._ref.manifest.world_size, start, stop):
                values = self._file(piece.source_rank).read(f"{name}/{part}", piece.start, piece.stop)
                result[piece.offset : piece.offset + piece.stop - piece.start] = values
        except CorruptFile as error:
            raise CheckpointCorrupt(self._ref.name, str(error)) from error
        return result

    def _file(self, rank: int) -> TensorFile:
        if rank not in self._files:
            self._files[rank] = TensorFile(self._directory, self._ref.manifest.files[rank])
        return self._files[rank]


def read_manifest(checkpoints: Storage, name: str) -> CheckpointRef:
    """Raises FileNotFoundError where nothing was committed, CorruptFile where manifest or a file's size is wrong."""
    directory = checkpoints.child(name)
    manifest = CheckpointManifest.from_bytes(directory.read(MANIFEST), directory.uri_of(MANIFEST))
    for entry in manifest.files:
        size = directory.size(entry.path)
        if size != entry.size:
            problem = "is missing" if size is None else f"has {size} bytes"
            raise CorruptFile(f"{directory.uri_of(entry.path)} {problem}; its manifest says {entry.size} bytes")
    return CheckpointRef(name, manifest)


def verify(checkpoints: Storage, name: str) -> CheckpointRef:
    """Read every byte of a checkpoint. Raises CorruptFile or FileNotFoundError with the file and what is wrong."""
    ref = read_manifest(checkpoints, name)
    for entry in ref.manifest.files:
        reader = VerifiedReader(checkpoints.child(name), entry)
        reader.verify_all()
        reader.close()
    return ref


def committed(
    checkpoints: Storage, *, on_bad: Callable[[str, str], None] = lambda name, problem: None
) -> list[CheckpointRef]:
    """Committed checkpoints whose files have the right sizes, oldest first.

    Args:
        on_bad: called with name and problem for each directory that has a manifest which can't be accepted.
    """
    found = []
    for name in checkpoints.list():
        try:
            found.append(read_manifest(checkpoints, name))
        except FileNotFoundError:
            continue
        except CorruptFile as error:
            on_bad(name, str(error))
    return sorted(found, key=lambda ref: (ref.step, ref.name))
