"""Saving and loading the trained state: rank files first, one manifest last, any world size back.

Layout under ``checkpoints/``: ``<step>-<attempt>/rank-00000.safetensors …``, ``rank-00000.hashes …``,
``receipts/rank-00000.json …`` (how rank 0 learns sizes and hashes, without a collective), ``manifest.json``. Of the
fast tier (``fast_tier.py``) the folder is ``<step>-<attempt>.fast``, and the rank files lie elsewhere. No attempt
writes into another's directory.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from data_shards.errors import BatonError, CorruptFile
from data_shards.storage import Storage
from data_shards.verified_reader import Piece, by_span, verify_file
from trainer.checkpoint_manifest import MANIFEST, CheckpointManifest, ParameterEntry
from trainer.engine import ZeroEngine
from trainer.errors import CheckpointCorrupt, CheckpointOutOfReach
from trainer.rank_file import RANK_BLOCK_BYTES, FilePlaces, RankFile
from trainer.slices import overlaps
from trainer.staging import Staging
from trainer.tensor_files import TensorFile, TensorSpec, write_tensors

Slices = Mapping[str, torch.Tensor]
"""``name/part`` to the 1-D fp32 elements that a rank holds."""
_FAST = ".fast"
_NAME = re.compile(rf"(\d{{8,}})-(.+?)(?:{re.escape(_FAST)})?")
_RECEIPTS = "receipts"
_NAMED = 8
_READERS = 8
"""Threads of a rank: a network file system or an object store answers many requests at once."""


@dataclass(frozen=True)
class CheckpointRef:
    """A committed checkpoint: its directory's name under ``checkpoints/`` and its manifest."""

    name: str
    manifest: CheckpointManifest

    @property
    def step(self) -> int:
        return self.manifest.progress.step


def directory_name(step: int, attempt: str, *, fast: bool = False) -> str:
    return f"{step:08d}-{attempt}{_FAST if fast else ''}"


def is_fast(name: str) -> bool:
    """Whether a directory's name is that of a checkpoint of the fast tier."""
    return name.endswith(_FAST)


def name_of(manifest: CheckpointManifest) -> str:
    return directory_name(manifest.progress.step, manifest.attempt, fast=manifest.fast)


def parse_name(name: str) -> tuple[int, str]:
    """Step and attempt of a directory's name; -1 and the name itself where it is none of ours."""
    found = _NAME.fullmatch(name)
    return (int(found[1]), found[2]) if found else (-1, name)


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def hash_file(rank: int) -> str:
    return f"rank-{rank:05d}.hashes"


def completed(draft: CheckpointManifest, engine: ZeroEngine) -> CheckpointManifest:
    """The manifest but for its files. ``draft`` lacks ``world_size``, ``parameters`` and most of ``optimizer``."""
    return replace(
        draft,
        world_size=engine.world_size,
        parameters=tuple(ParameterEntry(p.name, p.shape) for p in engine.trained),
        optimizer={**draft.optimizer, "step": engine.optimizer_step(), "state_keys": engine.state_keys()},
        files=(),
    )


def target_of(checkpoints: Storage, manifest: CheckpointManifest, rank: int = 0) -> Storage:
    """Where a checkpoint is written. Raises BatonError, on rank 0, where one was committed already.

    Rank 0 alone commits. On other nodes a network file system would go on for a while believing what this look found:
    that there is no manifest.
    """
    target = checkpoints.child(name_of(manifest))
    if rank == 0 and target.exists(MANIFEST):
        raise BatonError(f"{target.uri} is committed already; an attempt must not write there twice")
    return target


def files_folder(target: Storage, manifest: CheckpointManifest) -> Storage:
    """Where rank files are written: beside the manifest, or of the fast tier on this node's disk."""
    return target if manifest.files_at is None else Storage.at(manifest.files_at).child(name_of(manifest))


def write_rank(target: Storage, rank: int, slices: Slices, place: Storage | None = None) -> None:
    """Write a rank's slices and their hashes, to ``place`` where that is not ``target``; then its receipt."""
    place = place or target
    specs = {key: TensorSpec(tuple(value.shape), value.dtype) for key, value in slices.items()}
    entry = write_tensors(place, rank_file(rank), specs, slices.__getitem__, block_bytes=RANK_BLOCK_BYTES)
    hashes = place.write(hash_file(rank), [entry.digests])
    listed = RankFile(entry.path, entry.size, entry.block_bytes, hashes)
    target.write(f"{_RECEIPTS}/{_receipt(rank)}", [json.dumps(listed.to_json()).encode()])


def missing_receipts(target: Storage, world_size: int) -> list[int]:
    """Ranks that have not written theirs, as far as can be seen from here."""
    there = set(target.list(_RECEIPTS))
    return [rank for rank in range(world_size) if _receipt(rank) not in there]


def commit(target: Storage, manifest: CheckpointManifest) -> CheckpointRef:
    """Write the manifest, with the files that the receipts tell of: from now on the checkpoint exists.

    Raises FileNotFoundError where a receipt is missing.
    """
    paths = [f"{_RECEIPTS}/{_receipt(rank)}" for rank in range(manifest.world_size)]
    files = tuple(RankFile.from_json(json.loads(target.read(path)), target.uri_of(path)) for path in paths)
    whole = replace(manifest, files=files)
    target.write(MANIFEST, [whole.to_bytes()])
    return CheckpointRef(name_of(whole), whole)


def discard(target: Storage) -> None:
    """Remove what a save that failed has left. No rank may be writing there any more.

    Raises BatonError where it was committed after all.
    """
    if target.exists(MANIFEST):
        raise BatonError(f"{target.uri} is committed; only retention removes it")
    with suppress(FileNotFoundError):  # no rank began to write
        target.delete_tree("")


def _receipt(rank: int) -> str:
    return f"rank-{rank:05d}.json"


def load(
    engine: ZeroEngine,
    checkpoints: Storage,
    ref: CheckpointRef,
    staging: Staging | None = None,
    *,
    weights_only: bool = False,
) -> None:
    """Put a committed checkpoint into a fresh engine of any world size. Each rank reads only the ranges it needs.

    Args:
        staging: host memory that is there anyway, for a state that lies on a GPU.
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
    targets = dict(engine.slices_to_load(int(manifest.optimizer["step"]), keys))
    with SliceReader(checkpoints.child(ref.name), ref) as reader:

        def read(slices: Slices) -> None:
            reader.fill(
                Wanted(entry.name, part, entry.numel, engine.bounds(entry)[0], slices[f"{entry.name}/{part}"])
                for entry in engine.trained
                for part in ("fp32", *keys)
            )

        (staging or Staging(engine.device)).fill(targets, read)
    engine.slices_loaded()


class Wanted(NamedTuple):
    """Elements of a flattened parameter, from ``start`` on, and where they are to go."""

    name: str
    part: str
    numel: int
    """of the whole parameter"""
    start: int
    into: torch.Tensor
    """1-D fp32, on the CPU"""


class SliceReader:
    """Reads elements of whole parameters out of the rank files of one checkpoint, many blocks at a time."""

    def __init__(self, directory: Storage, ref: CheckpointRef) -> None:
        self._places = FilePlaces(directory, ref.name, ref.manifest.files_at)
        self._ref = ref
        self._files: dict[int, TensorFile] = {}
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="checkpoint-reader")

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            file.close()

    def read(self, name: str, part: str, numel: int, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` of the flattened parameter: fp32 ``[stop - start]``."""
        result = torch.empty(stop - start, dtype=torch.float32)
        self.fill([Wanted(name, part, numel, start, result)])
        return result

    def fill(self, wanted: Iterable[Wanted]) -> None:
        """Read all of it, each block of a file once. Raises CheckpointCorrupt."""
        pieces: dict[int, list[Piece]] = {}
        try:
            for name, part, numel, start, into in wanted:
                for found in overlaps(numel, self._ref.manifest.world_size, start, start + into.numel()):
                    target = into[found.offset : found.offset + found.stop - found.start]
                    piece = self._file(found.source_rank).piece(f"{name}/{part}", found.start, target)
                    pieces.setdefault(found.source_rank, []).append(piece)
            jobs = [(self._file(rank).verified, span) for rank, some in pieces.items() for span in by_span(some)]
            for _ in self._pool.map(lambda job: job[0].read_span(job[1]), jobs):
                pass
        except CorruptFile as error:
            raise CheckpointCorrupt(self._ref.name, str(error)) from error
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise CheckpointCorrupt(self._ref.name, f"its disk fails: {error}") from error

    def _file(self, rank: int) -> TensorFile:
        if rank not in self._files:
            listed = self._ref.manifest.files[rank]
            if (place := self._places.find(listed)) is None:
                raise out_of_reach(self._ref, [listed])
            self._files[rank] = TensorFile(place, listed.hashed(place))
        return self._files[rank]


def read_manifest(checkpoints: Storage, name: str) -> CheckpointRef:
    """Raises FileNotFoundError where nothing was committed, CorruptFile where manifest or a file's size is wrong.

    Of the fast tier files are not looked at: they may lie on other nodes.
    """
    directory = checkpoints.child(name)
    sizes = directory.sizes()  # one request for a thousand ranks
    if MANIFEST not in sizes:
        raise FileNotFoundError(directory.uri_of(MANIFEST))
    manifest = CheckpointManifest.from_bytes(directory.read(MANIFEST), directory.uri_of(MANIFEST))
    if not manifest.fast:
        for entry in manifest.files:
            entry.check_sizes(sizes, directory)
    return CheckpointRef(name, manifest)


def out_of_reach(ref: CheckpointRef, lost: Sequence[RankFile]) -> CheckpointOutOfReach:
    files = ", ".join(listed.path for listed in lost[:_NAMED])
    return CheckpointOutOfReach(
        ref.name, f"whole in {ref.manifest.files_at} on no node that is here: {files}, {len(lost)} of its files"
    )


def verify(checkpoints: Storage, name: str, suspects: str = "") -> CheckpointRef:
    """Read every byte of a checkpoint, from where it is kept, and not what this machine has of it in memory.

    Args:
        suspects: a text. Only the files that it names are read, if it names any.

    Raises CorruptFile or FileNotFoundError with the file and what is wrong; CheckpointOutOfReach where it is of the
    fast tier, and not all of it is on this node.
    """
    ref = read_manifest(checkpoints, name)
    places = FilePlaces(checkpoints.child(name), name, ref.manifest.files_at)
    named = [entry for entry in ref.manifest.files if any(path in suspects for path in entry.paths)]
    for entry in named or ref.manifest.files:
        if (place := places.find(entry)) is None:
            raise out_of_reach(ref, [entry])
        verify_file(place, entry.hashed(place))
    return ref
