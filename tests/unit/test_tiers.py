"""Two tiers of checkpoints: when each is due, which is newest, what stays, what is cleared from a node."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_shards import signed_json
from data_shards.errors import BatonError, CorruptFile
from data_shards.storage import Storage
from launch import checkpoints
from tests.support.checkpoints import random_values, write_checkpoint
from tests.support.command import run_here
from tests.support.tiny import DRAFT
from tests.unit.test_run_directory import commit, found_unusable
from trainer import resume
from trainer.checkpoint import directory_name, hash_file, is_fast, parse_name, rank_file, read_manifest, target_of
from trainer.checkpoint_manifest import KIND, MANIFEST, VERSION, CheckpointManifest, ParameterEntry
from trainer.checkpointing import Cadence, Tier
from trainer.config import CheckpointConfig, FastTierConfig
from trainer.disk_plan import fast_tier_bytes
from trainer.errors import CheckpointOutOfReach
from trainer.fast_tier import FastTier, folder_on_node, needed_files
from trainer.model_shape import FP32, ParameterShape
from trainer.retention import prune
from trainer.run_directory import RunDirectory
from trainer.survey import NoUsableCheckpoint, newest_usable, quarantine, survey

AT = "/nvme/run-12345678"
FAST = FastTierConfig(path="/nvme", every_steps=5, keep_last=2)


def silent(line: str) -> None:
    pass


def steps_of(run: RunDirectory) -> list[tuple[int, bool]]:
    return [(ref.step, ref.manifest.fast) for ref in survey(run).usable]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"path": "nvme", "every_steps": 5}, "give an absolute path"),
        ({"path": "s3://bucket/x", "every_steps": 5}, "an object store belongs in run.storage"),
        ({"path": "/nvme", "every_steps": 100}, "not a multiple, and more, of fast.every_steps=100"),
        ({"path": "/nvme", "every_steps": 7}, "every_steps=100 is not a multiple, and more, of fast.every_steps=7"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        CheckpointConfig.model_validate({"every_steps": 100, "fast": values})


def test_durable_ones_come_first_where_both_are_due() -> None:
    cadence = Cadence(every_steps=10, fast_every_steps=4, files_at=AT)
    due = {step: tier for step in range(1, 21) if (tier := cadence.due(step))}
    assert due == {4: Tier.FAST, 8: Tier.FAST, 10: Tier.DURABLE, 12: Tier.FAST, 16: Tier.FAST, 20: Tier.DURABLE}
    assert not any(Cadence(every_steps=10).due(step) for step in (4, 8, 12))


def test_names_tell_the_tier() -> None:
    name = directory_name(12, "0a1b", fast=True)
    assert is_fast(name) and parse_name(name) == (12, "0a1b") == parse_name(directory_name(12, "0a1b"))
    assert not is_fast(directory_name(12, "0a1b"))


def test_older_readers_take_what_they_know_and_refuse_the_rest() -> None:
    durable = replace(DRAFT, world_size=0)
    fast = replace(durable, files_at=AT)
    evaluated = replace(durable, progress=replace(DRAFT.progress, best_eval_loss=1.0, best_eval_step=0))
    assert fast.fast and not durable.fast
    for manifest, version in ((durable, 3), (fast, 4), (evaluated, VERSION)):
        written = manifest.to_bytes()
        signed_json.decode(written, KIND, version, "here")
        assert CheckpointManifest.from_bytes(written, "here") == manifest
        with pytest.raises(CorruptFile, match=f"format version {version}, this Baton reads up to {version - 1}"):
            signed_json.decode(written, KIND, version - 1, "here")


def test_the_newest_of_either_and_of_one_step_the_durable_one(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ())
    for step, files_at in ((10, None), (15, AT), (20, AT), (20, None), (22, AT), (25, AT)):
        commit(run, attempt.attempt, step, files_at)
    assert steps_of(run) == [(10, False), (15, True), (20, True), (20, False), (22, True), (25, True)]
    newest = newest_usable(run, silent)
    assert newest is not None and newest.name == directory_name(25, attempt.attempt, fast=True)
    found_unusable(run, attempt, newest.name, corrupt=False)
    without = newest_usable(run, silent)
    assert without is not None and without.name == directory_name(20, attempt.attempt), "all that were on the nodes"


def test_where_one_is_corrupt_the_fast_one_before_it_is_taken(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    for step, files_at in ((20, None), (22, AT), (25, AT)):
        commit(run, first.attempt, step, files_at)
    found_unusable(run, first, directory_name(25, first.attempt, fast=True), corrupt=True)
    without = newest_usable(run, silent)
    assert without is not None and without.step == 22
    second = run.start_attempt(run.lineage()[-1], without, ())
    assert [ref.step for ref in survey(run).usable] == [20, 22] and second.start_step == 22


def test_each_tier_has_its_own_retention(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ()).attempt
    for step in range(5, 50, 5):
        commit(run, attempt, step, None if step % 20 == 0 else AT, eval_loss=float(step), eval_step=step)
    config = CheckpointConfig(keep_last=1, keep_every=5, keep_best=1, fast=FAST)
    assert steps_of(run)[-2:] == [(40, False), (45, True)]
    prune(run, config, attempt)
    assert steps_of(run) == [(20, False), (40, False), (45, True)], "what is older than a durable one is of no use"
    for step in (50, 55):
        commit(run, attempt, step, AT)
    prune(run, CheckpointConfig(keep_last=1, fast=FAST), attempt)
    assert steps_of(run) == [(40, False), (50, True), (55, True)]
    prune(run, CheckpointConfig(keep_last=1), attempt)
    assert steps_of(run) == [(40, False), (55, True)], "the newest of all stays, the tier configured or not"


def test_a_quarantined_one_does_not_fill_the_nodes_for_ever(tmp_path: Path) -> None:
    """Until a durable one is newer, or its attempt is superseded; a durable one stays for people to look at."""
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    durable = commit(run, first.attempt, 10)
    fast = [commit(run, first.attempt, step, AT) for step in (15, 20, 25)]
    for name in (durable, *fast[1:]):
        quarantine(run, name, "a bit")
    config = CheckpointConfig(keep_last=1, fast=FAST)
    assert prune(run, config, first.attempt) == []
    second = run.start_attempt(first, read_manifest(run.checkpoints, fast[0]), ())  # 20 and 25 are superseded
    commit(run, second.attempt, 17, AT)
    assert prune(run, config, second.attempt) == fast[1:]
    quarantine(run, fast[0], "another")
    assert prune(run, config, second.attempt) == []
    newer = commit(run, second.attempt, 18)
    prune(run, config, second.attempt)
    assert run.checkpoints.list() == [durable, newer]


def test_runs_begin_anew_only_where_nothing_durable_was_lost(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    name = commit(run, first.attempt, 5, AT)
    said: list[str] = []
    assert newest_usable(found_unusable(run, first, name, corrupt=False), said.append) is None
    assert "those are lost: the run begins anew" in said[-1]
    anew = run.start_attempt(run.lineage()[-1], None, ())
    run.checkpoints.delete_tree(name)
    assert newest_usable(run, said.append) is None, "that was before the new beginning"
    durable = commit(run, anew.attempt, 10)
    found_unusable(run, anew, durable, corrupt=True)
    with pytest.raises(NoUsableCheckpoint, match=durable):
        newest_usable(run, said.append)


def test_where_even_the_manifests_are_gone_somebody_removed_them(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    commit(run, first.attempt, 5, AT)
    run.start_attempt(first, newest_usable(run, silent), ())
    run.storage.delete_tree("checkpoints")
    with pytest.raises(NoUsableCheckpoint, match="they are gone"):
        newest_usable(run, silent)


def test_a_node_is_cleared_of_what_is_no_longer_a_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path / "storage" / "mine"))
    before = run.start_attempt(None, None, ())
    now = run.start_attempt(before, None, ())
    folder = folder_on_node(str(tmp_path / "nvme"), run.storage)
    tier = FastTier.open(str(tmp_path / "nvme"), run, now.attempt)
    later = run.start_attempt(now, None, ())
    kept = commit(run, now.attempt, 10, folder.uri)
    writing = directory_name(15, now.attempt, fast=True)
    unknown = directory_name(15, later.attempt, fast=True)
    gone = [directory_name(5, now.attempt, fast=True), directory_name(9, before.attempt, fast=True)]
    for name in (kept, writing, unknown, *gone, "notes"):
        folder.child(name).write("rank-00000.safetensors", [b"x"])
    tier.clear(writing)
    assert folder.list() == sorted([kept, writing, unknown, "notes"])
    (tmp_path / "storage").rename(tmp_path / "away")
    tier.clear()
    assert kept in folder.list(), "a storage that is away for a moment looks as if there were no manifests"
    (tmp_path / "away").rename(tmp_path / "storage")
    tier.leave()
    assert folder.list() == sorted([unknown, "notes"])
    assert folder_on_node(str(tmp_path / "nvme"), Storage.at(tmp_path / "other" / "mine")) != folder


def test_only_one_rank_of_a_node_clears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    run = RunDirectory.at(str(tmp_path / "storage"))
    attempt = run.start_attempt(None, None, ()).attempt
    tier = FastTier.open(str(tmp_path / "nvme"), run, attempt)
    tier.folder.child(directory_name(5, attempt, fast=True)).write("x", [b"x"])
    tier.clear()
    assert tier.folder.list()


def test_a_node_that_does_not_see_the_last_commits_keeps_its_parts_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over NFS, which goes on believing for half a minute that a manifest is not there."""
    run = RunDirectory.at(str(tmp_path / "storage"))
    attempt = run.start_attempt(None, None, ()).attempt
    tier = FastTier.open(str(tmp_path / "nvme"), run, attempt)
    exists = Storage.exists
    unseen: list[str] = []
    monkeypatch.setattr(
        Storage, "exists", lambda at, name: not (name == MANIFEST and at.uri in unseen) and exists(at, name)
    )
    for step in (5, 10, 15, 20):
        writing = directory_name(step, attempt, fast=True)
        tier.clear(writing)
        tier.folder.child(writing).write("rank-00000.safetensors", [b"x"])
        commit(run, attempt, step, AT)
        unseen.append(run.checkpoints.child(writing).uri)
    assert [parse_name(name)[0] for name in tier.folder.list()] == [10, 15, 20]


def test_only_rank_zero_looks_whether_a_checkpoint_is_committed(tmp_path: Path) -> None:
    """So that on no other node a network file system can remember that it was not there."""
    checkpoints = Storage.at(tmp_path)
    ref = write_checkpoint(checkpoints, replace(DRAFT, world_size=1, optimizer={"state_keys": []}), random_values())
    with pytest.raises(BatonError, match="is committed already"):
        target_of(checkpoints, ref.manifest)
    assert target_of(checkpoints, ref.manifest, rank=1).uri == checkpoints.child(ref.name).uri


def test_a_manifest_that_is_shown_late_is_looked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.at(str(tmp_path))
    name = commit(run, run.start_attempt(None, None, ()).attempt, 5, AT)
    spec: Any = SimpleNamespace(resume_from=name, base_identity=DRAFT.base, other_base=False)
    monkeypatch.setattr(resume, "bring_together", lambda checkpoints, ref: None)
    monkeypatch.setattr(resume, "_PAUSE_S", 0.01)
    sizes, looks = Storage.sizes, 0

    def late(storage: Storage, relative: str = "") -> dict[str, int]:
        nonlocal looks
        looks += 1
        return sizes(storage, relative) if looks > 3 else {}

    monkeypatch.setattr(Storage, "sizes", late)
    with pytest.raises(CheckpointOutOfReach, match="not there any more"):
        resume.find_resumed(run, spec, patience_s=0)
    found = resume.find_resumed(run, spec)
    assert found is not None and found.name == name and looks == 4


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 9))
def test_the_files_that_ranks_need_are_all_and_at_the_same_size_ones_own(
    numels: list[int], saved_by: int, world_size: int
) -> None:
    parameters = tuple(ParameterEntry(f"p{index}", (numel,)) for index, numel in enumerate(numels))
    manifest = replace(DRAFT, world_size=saved_by, parameters=parameters)
    needed = [needed_files(manifest, rank, world_size) for rank in range(world_size)]
    with_something = {rank for rank in range(saved_by) if any(rank * -(-n // saved_by) < n for n in numels)}
    assert set().union(*needed) == with_something
    if world_size == saved_by:
        assert all(found <= {rank} for rank, found in enumerate(needed))


def test_sizes_of_files_on_nodes_are_not_looked_at_where_the_manifest_is_read(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ()).attempt
    name = commit(run, attempt, 5, AT)
    run.checkpoints.delete_file(f"{name}/rank-00000.safetensors")
    assert read_manifest(run.checkpoints, name).manifest.files_at == AT


def test_verify_reads_what_is_here_and_names_what_is_away(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path / "run"))
    run.storage.write("run.json", [b"{}"])
    attempt = run.start_attempt(None, None, ()).attempt
    here = commit(run, attempt, 5, str(tmp_path / "nvme"))
    shutil.copytree(tmp_path / "run" / "checkpoints" / here, tmp_path / "nvme" / here)
    away = commit(run, attempt, 10, str(tmp_path / "nvme"))
    for name in (here, away):
        run.checkpoints.delete_file(f"{name}/rank-00000.safetensors")
    told = run_here(checkpoints.main, "verify", str(tmp_path / "run"))
    assert told.code == 0 and f"good  {here}" in told.output, told.output
    assert f"away  {away}  checkpoint {away}: whole in {tmp_path}/nvme on no node that is here" in told.output
    listed = run_here(checkpoints.main, "list", str(tmp_path / "run")).output
    assert f"{away}  on the nodes, in {tmp_path}/nvme" in listed
    (tmp_path / "nvme" / here / "rank-00000.safetensors").write_bytes(b"y")
    told = run_here(checkpoints.main, "verify", str(tmp_path / "run"))
    assert told.code == 1 and f"BAD   {here}" in told.output, told.output


def test_the_plan_counts_what_a_rank_writes_to_its_node(tmp_path: Path) -> None:
    """To the byte: of rank 0, which writes the most; those kept, one that is written, one yet to be taken away."""
    shapes = {"wide": (3, 50), "odd": (7,)}
    parameters = tuple(ParameterEntry(name, shape) for name, shape in shapes.items())
    states = ("exp_avg", "exp_avg_sq")
    manifest = replace(DRAFT, world_size=3, parameters=parameters, optimizer={"state_keys": list(states)})
    ref = write_checkpoint(Storage.at(tmp_path), manifest, random_values())
    written = [(tmp_path / ref.name / name).stat().st_size for name in (rank_file(0), hash_file(0))]
    trained = [ParameterShape(name, shape, FP32, True) for name, shape in shapes.items()]
    assert fast_tier_bytes(CheckpointConfig(fast=FAST), trained, 3, states) == (FAST.keep_last + 2) * sum(written)
    assert fast_tier_bytes(CheckpointConfig(), trained, 3, states) == 0
