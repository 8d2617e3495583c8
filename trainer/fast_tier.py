"""The fast tier: checkpoints whose rank files lie on the nodes' own disks, so that they cost the network nothing.

Receipts and manifest lie under ``checkpoints/`` in the run's storage, as those of any other, so they are committed,
fenced, kept and quarantined alike. What differs is where the files are: each node has those of its own ranks, and when
a node is gone they are, too.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from data_shards.errors import BadInput, CorruptFile
from data_shards.storage import Storage, sha256
from data_shards.verified_reader import VerifiedReader
from trainer.checkpoint import CheckpointRef, parse_name
from trainer.checkpoint_manifest import CheckpointManifest
from trainer.errors import CheckpointCorrupt, CheckpointOutOfReach
from trainer.process_group import is_first_on_node
from trainer.progress_log import say_on_first_rank
from trainer.rank_file import RankFile, place_of
from trainer.run_directory import RunDirectory
from trainer.slices import overlaps, slice_bounds

_NAMED = 8
_Told = TypeVar("_Told")


@dataclass(frozen=True)
class FastTier:
    """This node's folder of it, for one run."""

    folder: Storage
    checkpoints: Storage
    """of the run's storage"""
    mine_to_clear: frozenset[str]
    """attempts that began before this one, and this one, on one rank of each node; what later ones have here is not for
    this one to judge"""

    @classmethod
    def open(cls, path: str, run: RunDirectory) -> FastTier:
        """Raises BadInput where it can't be written."""
        folder = folder_on_node(path, run.storage)
        try:
            folder.check_writable()
        except BadInput as error:
            raise BadInput(f"checkpoint.fast.path={path!r} on node {socket.gethostname()}: {error}") from error
        return cls(folder, run.checkpoints, frozenset(run.attempts() if is_first_on_node() else ()))

    def clear(self, writing: str | None = None) -> None:
        """Remove what nobody can read any more: what has nothing under ``checkpoints/``, as retention took it away or
        its save failed.

        Args:
            writing: name of the checkpoint that this attempt's ranks are writing.
        """
        if not self.mine_to_clear:
            return
        told_of = {*self.checkpoints.list(), writing}
        for name in self.folder.list():
            if name not in told_of and parse_name(name)[1] in self.mine_to_clear:
                self.folder.delete_tree(name)

    def leave(self) -> None:
        """Clear it for good, when the run has ended."""
        self.clear()
        if self.mine_to_clear and not self.folder.list():
            self.folder.delete_tree("")


def folder_on_node(path: str, run: Storage) -> Storage:
    """A run's own one: runs of one name in two storages have two."""
    name = run.uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    return Storage.at(path).child(f"{name}-{sha256(run.uri.encode())[:12]}")


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
        CheckpointOutOfReach: on all ranks, where a file is on none of the nodes that are here, or can't be copied.
        CheckpointCorrupt: on a rank that found a block of what it copied to be wrong.
    """
    beside, manifest, rank = checkpoints.child(ref.name), ref.manifest, dist.get_rank()
    here = {
        index
        for index, listed in enumerate(manifest.files)
        if listed.is_whole(place_of(beside, ref.name, manifest.files_at, listed))
    }
    lacks = needed_files(manifest, rank, dist.get_world_size()) - here
    held_by, lacking = _gathered(here), set().union(*_gathered(lacks))
    if not lacking:
        return
    holders = {file: next((r for r, held in enumerate(held_by) if file in held), None) for file in sorted(lacking)}
    if lost := [file for file, holder in holders.items() if holder is None]:
        files = ", ".join(manifest.files[file].path for file in lost[:_NAMED])
        raise CheckpointOutOfReach(
            ref.name, f"{files} ({len(lost)} of {len(manifest.files)} files): whole on none of the nodes that are here"
        )
    say_on_first_rank(
        f"checkpoint {ref.name}: {len(lacking)} files are brought to nodes that need them, by run.storage"
    )
    problem: Exception | None = None
    try:
        for file, holder in holders.items():
            if holder == rank:
                listed = manifest.files[file]
                _copy(listed, place_of(beside, ref.name, manifest.files_at, listed), beside)
    except (OSError, CorruptFile) as error:
        problem = error
    failed = [told for told in _gathered(str(problem) if problem else "") if told]
    if isinstance(problem, CorruptFile):
        raise CheckpointCorrupt(ref.name, str(problem)) from problem
    if failed:
        raise CheckpointOutOfReach(ref.name, f"its files can't be brought together: {failed[0]}") from problem


def _gathered(mine: _Told) -> list[_Told]:
    """Every rank's, by rank. Collective."""
    found: list[_Told] = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found


def _copy(listed: RankFile, source: Storage, target: Storage) -> None:
    """Every block is verified on the way; the hashes go last, so that what is whole there has all."""
    hashed = listed.hashed(source)
    reader = VerifiedReader(source, hashed)
    try:
        target.write(listed.path, reader.blocks())
    finally:
        reader.close()
    assert listed.hashes is not None, "versions without them knew no fast tier"
    target.write(listed.hashes.path, [hashed.digests])
