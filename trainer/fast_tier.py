"""The fast tier: checkpoints whose rank files lie on the nodes' own disks, so that they cost the network nothing.

Receipts and manifest lie under ``checkpoints/`` in the run's storage, as those of any other, so they are committed,
fenced, kept and quarantined alike. What differs is where the files are: each node has those of its own ranks, and when
a node is gone they are, too.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import torch.distributed as dist

from data_shards.errors import BadInput, CorruptFile
from data_shards.storage import Storage, sha256
from data_shards.verified_reader import VerifiedReader
from trainer.checkpoint import CheckpointRef, out_of_reach, parse_name
from trainer.checkpoint_manifest import MANIFEST, CheckpointManifest
from trainer.errors import BringingFailed, CheckpointCorrupt, CheckpointOutOfReach
from trainer.process_group import is_first_on_node
from trainer.progress_log import ProgressLog, say_on_first_rank
from trainer.rank_file import FilePlaces, RankFile
from trainer.room import is_out_of_room
from trainer.run_directory import RunDirectory
from trainer.slices import overlaps, slice_bounds
from trainer.tensor_files import Repeated

_PATIENCE_S, _PAUSE_S = 10.0, 0.5
"""A file system over the network may show another node's file a few seconds late."""
_LAST_WAIT_S = 30.0
_SPARED = 2
"""Of the names last written: the newest commit, also where the save after it failed."""
_Told = TypeVar("_Told")


@dataclass(frozen=True)
class FastTier:
    """This node's folder of it, for one run."""

    folder: Storage
    run: RunDirectory
    attempt: str
    mine_to_clear: frozenset[str]
    """on one rank of each node this attempt and those that it goes back to; of what others have here, it does not
    know what is still needed"""
    _written: deque[str] = field(default_factory=lambda: deque(maxlen=_SPARED + 1), init=False, compare=False)
    """in this attempt, and what is being written"""

    @classmethod
    def open(cls, path: str, run: RunDirectory, attempt: str) -> FastTier:
        """Raises BadInput where it can't be written."""
        folder = folder_on_node(path, run.storage)
        try:
            folder.check_writable()
        except (BadInput, OSError) as error:
            raise BadInput(
                f"checkpoint.fast.path={path!r}: no use on node {socket.gethostname()}: {error.__cause__ or error}"
            ) from error
        ancestors = run.lineage_to(attempt) if is_first_on_node() else []
        return cls(folder, run, attempt, frozenset(start.attempt for start in ancestors))

    def clear(self, writing: str | None = None) -> None:
        """Remove what has no manifest: retention took it away, or its save failed or was killed. Call it while no rank
        writes, but for ``writing``, the name of what this attempt's ranks begin to write. The last two that they wrote
        stay: a network file system may show the manifest of a checkpoint that was just committed late.

        What can't be removed is told.
        """
        if writing is not None:
            self._written.append(writing)
        if not self.mine_to_clear or not self.run.attempt(self.attempt).exists("start.json"):
            return  # not this rank's, or the run's storage is away, and there it looks as if there were no manifests
        self._remove(
            name
            for name in self.folder.list()
            if name not in self._written and not self.run.checkpoints.child(name).exists(MANIFEST)
        )

    def leave(self) -> None:
        """Remove all, once the run's last checkpoint, a durable one, is committed; behind the caller, who waits for a
        while: the disk may hang."""
        thread = threading.Thread(target=self._leave, name="fast-tier", daemon=True)
        thread.start()
        thread.join(_LAST_WAIT_S)

    def _leave(self) -> None:
        if self.mine_to_clear:
            self._remove(self.folder.list())
            with suppress(OSError):
                if not self.folder.list():
                    self.folder.delete_tree("")

    def _remove(self, names: Iterable[str]) -> None:
        try:
            for name in names:
                if parse_name(name)[1] in self.mine_to_clear:
                    with suppress(FileNotFoundError):  # another node has, where the path is shared
                        self.folder.delete_tree(name)
        except OSError as error:
            ProgressLog.warn(f"{self.folder.uri} could not be cleared: {error}")


def folder_on_node(path: str, run: Storage) -> Storage:
    """A run's own one: runs of one name in two storages have two."""
    name = run.uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    return Storage.at(path).child(f"{name}-{sha256(run.uri.encode())[:12]}")


def open_everywhere(path: str, run: RunDirectory, attempt: str, *, resuming: bool) -> FastTier | None:
    """Collective. None where some node can't write there and the run has begun: a broken disk of one node is no reason
    to end it; the attempt has no fast tier then, and tells so.

    Raises BadInput, on all ranks, where the run is new.
    """
    found, problem = None, ""
    try:
        found = FastTier.open(path, run, attempt)
    except BadInput as error:
        problem = str(error)
    problems = [told for told in _gathered(problem) if told]
    if not problems:
        return found
    if not resuming:
        raise BadInput(f"{problems[0]}. Give a folder that all nodes can write, or leave checkpoint.fast away")
    if dist.get_rank() == 0:
        ProgressLog.warn(f"this attempt has no fast tier of checkpoints: {problems[0]}")
    return None


def needed_files(manifest: CheckpointManifest, rank: int, world_size: int) -> set[int]:
    """Ranks whose files one of ``world_size`` ranks reads (pure)."""
    found: set[int] = set()
    for parameter in manifest.parameters:
        bounds = slice_bounds(parameter.numel, rank, world_size)
        found.update(piece.source_rank for piece in overlaps(parameter.numel, manifest.world_size, *bounds))
    return found


def bring_together(checkpoints: Storage, ref: CheckpointRef) -> None:
    """Let every rank reach the files that it needs of a checkpoint of the fast tier: what lies on another node's disk,
    as ranks were placed otherwise or are more or fewer, is copied beside the manifest. Collective.

    Raises:
        CheckpointOutOfReach: where a file is on none of the nodes that are here, or there is no room for a copy.
        CheckpointCorrupt: on a rank that found a block of what it copied to be wrong.
        BringingFailed: a copy failed otherwise; it may not the next time.
    """
    beside, manifest, rank = checkpoints.child(ref.name), ref.manifest, dist.get_rank()
    places = FilePlaces(beside, ref.name, manifest.files_at)
    here = {index for index, listed in enumerate(manifest.files) if places.find(listed) is not None}
    lacks = needed_files(manifest, rank, dist.get_world_size()) - here
    held_by, lacking = _gathered(here), sorted(set().union(*_gathered(lacks)))
    if not lacking:
        return
    holders = {file: [r for r, held in enumerate(held_by) if file in held] for file in lacking}
    if lost := [manifest.files[file] for file, ranks in holders.items() if not ranks]:
        raise out_of_reach(ref, lost)
    say_on_first_rank(
        f"checkpoint {ref.name}: {len(lacking)} files are brought to nodes that need them, by run.storage"
    )
    problem: Exception | None = None
    try:
        for file, ranks in holders.items():
            if ranks[file % len(ranks)] == rank:  # those of a node share the work
                _copy(manifest.files[file], places, beside)
    except (OSError, CorruptFile) as error:
        problem = error
    problems = _gathered((str(problem) if problem else "", is_out_of_room(problem)))
    if isinstance(problem, CorruptFile):
        raise CheckpointCorrupt(ref.name, str(problem)) from problem
    for told, no_room in problems:
        if no_room:
            raise CheckpointOutOfReach(ref.name, f"no room to bring its files together: {told}") from problem
        if told:
            raise BringingFailed(f"checkpoint {ref.name}: its files could not be brought together: {told}") from problem
    _await_files(ref, beside, [manifest.files[file] for file in lacks])


def _await_files(ref: CheckpointRef, beside: Storage, listed: list[RankFile]) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while unseen := _unseen(FilePlaces(beside, ref.name, ref.manifest.files_at), listed):
        if time.monotonic() > deadline:
            raise BringingFailed(f"checkpoint {ref.name}: {unseen[0]} was copied to {beside.uri} and is not seen there")
        time.sleep(_PAUSE_S)


def _unseen(places: FilePlaces, listed: list[RankFile]) -> list[str]:
    return [file.path for file in listed if places.find(file) is None]


def _gathered(mine: _Told) -> list[_Told]:
    """Every rank's, by rank. Collective."""
    found: list[_Told] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _copy(listed: RankFile, places: FilePlaces, beside: Storage) -> None:
    """Every block is verified on the way; the hashes go last, so that what is whole there has all."""
    source = places.find(listed)
    assert source is not None and listed.hashes is not None, "this rank holds it; versions without hashes had one tier"
    hashed = listed.hashed(source)
    reader = VerifiedReader(source, hashed)
    try:
        beside.bounded().write(listed.path, Repeated(reader.blocks))
    finally:
        reader.close()
    beside.write(listed.hashes.path, [hashed.digests])
