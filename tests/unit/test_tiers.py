"""Two tiers of checkpoints: when each is due, which is newest, what stays, what is cleared from a node."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_shards import signed_json
from data_shards.storage import Storage
from launch import checkpoints
from tests.support.command import run_here
from tests.support.tiny import DRAFT
from tests.unit.test_run_directory import commit
from trainer.checkpoint import directory_name, is_fast, parse_name, read_manifest
from trainer.checkpoint_manifest import KIND, VERSION, CheckpointManifest, ParameterEntry
from trainer.checkpointing import Cadence, Tier
from trainer.config import CheckpointConfig, FastTierConfig
from trainer.fast_tier import FastTier, folder_on_node, needed_files
from trainer.retention import Sparing, prune
from trainer.run_directory import RunDirectory
from trainer.survey import NoUsableCheckpoint, newest_usable, survey

AT = "/nvme/run-12345678"
FAST = FastTierConfig(path="/nvme", every_steps=5, keep_last=2)


def steps_of(run: RunDirectory) -> list[tuple[int, bool]]:
    return [(ref.step, ref.manifest.fast) for ref in survey(run).usable]


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"path": "nvme", "every_steps": 5}, "give an absolute path"),
        ({"path": "s3://bucket/x", "every_steps": 5}, "an object store belongs in run.storage"),
        ({"path": "/nvme", "every_steps": 100}, "fast.every_steps=100 is not less than every_steps=100"),
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


def test_readers_of_version_3_take_durable_ones_and_refuse_fast_ones() -> None:
    durable = replace(DRAFT, world_size=0)
    fast = replace(durable, files_at=AT)
    signed_json.decode(durable.to_bytes(), KIND, 3, "here")
    assert CheckpointManifest.from_bytes(durable.to_bytes(), "here") == durable
    assert CheckpointManifest.from_bytes(fast.to_bytes(), "here") == fast and fast.fast
    with pytest.raises(Exception, match=f"format version {VERSION}, this Baton reads up to 3"):
        signed_json.decode(fast.to_bytes(), KIND, 3, "here")


def test_the_newest_of_either_and_of_one_step_the_durable_one(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ()).attempt
    for step, files_at in ((10, None), (15, AT), (20, AT), (20, None), (25, AT)):
        commit(run, attempt, step, files_at)
    assert steps_of(run) == [(10, False), (15, True), (20, True), (20, False), (25, True)]
    newest = newest_usable(run, lambda line: None)
    assert newest is not None and newest.name == directory_name(25, attempt, fast=True)
    without = newest_usable(run, lambda line: None, {newest.name: "its node is gone"})
    assert without is not None and without.name == directory_name(20, attempt)


def test_each_tier_has_its_own_retention(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ()).attempt
    for step in range(5, 50, 5):
        commit(run, attempt, step, None if step % 20 == 0 else AT, eval_loss=float(step), eval_step=step)
    config = CheckpointConfig(keep_last=1, keep_every=5, keep_best=1, fast=FAST)
    prune(run, config, attempt)
    assert steps_of(run) == [(20, False), (35, True), (40, False), (45, True)], "keep_every and keep_best: durable ones"
    prune(run, CheckpointConfig(keep_last=1, fast=FAST), attempt)
    assert steps_of(run) == [(35, True), (40, False), (45, True)]
    prune(run, CheckpointConfig(keep_last=1), attempt)
    assert steps_of(run) == [(40, False), (45, True)], "the newest of all stays, the tier configured or not"
    prune(run, CheckpointConfig(keep_last=1, fast=FAST), attempt, Sparing.FINISHED)
    assert steps_of(run) == [(40, False)]


def test_a_run_whose_durable_checkpoints_are_lost_does_not_begin_anew(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    commit(run, first.attempt, 5, AT)
    name = directory_name(5, first.attempt, fast=True)
    said: list[str] = []
    assert newest_usable(run, said.append, {name: "its node is gone"}) is None
    assert "those are lost: the run begins anew" in said[-1]
    durable = commit(run, first.attempt, 10)
    with pytest.raises(NoUsableCheckpoint, match=f"{name}, {durable}"):
        newest_usable(run, said.append, {name: "its node is gone", durable: "a bit is wrong"})


def test_a_node_is_cleared_of_what_is_no_longer_a_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path / "storage" / "mine"))
    before = run.start_attempt(None, None, ())
    now = run.start_attempt(before, None, ())
    folder = folder_on_node(str(tmp_path / "nvme"), run.storage)
    tier = FastTier.open(str(tmp_path / "nvme"), run)
    later = run.start_attempt(now, None, ())
    kept = commit(run, now.attempt, 10, folder.uri)
    writing = directory_name(15, now.attempt, fast=True)
    unknown = directory_name(15, later.attempt, fast=True)
    gone = [directory_name(5, now.attempt, fast=True), directory_name(9, before.attempt, fast=True)]
    for name in (kept, writing, unknown, *gone, "notes"):
        folder.child(name).write("rank-00000.safetensors", [b"x"])
    tier.clear(writing)
    assert folder.list() == sorted([kept, writing, unknown, "notes"])
    assert folder_on_node(str(tmp_path / "nvme"), Storage.at(tmp_path / "other" / "mine")) != folder


def test_only_one_rank_of_a_node_clears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    run = RunDirectory.at(str(tmp_path / "storage"))
    attempt = run.start_attempt(None, None, ()).attempt
    tier = FastTier.open(str(tmp_path / "nvme"), run)
    tier.folder.child(directory_name(5, attempt, fast=True)).write("x", [b"x"])
    tier.clear()
    assert tier.folder.list()


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
    assert f"away  {away}  checkpoint {away}: rank-00000.safetensors is not on this node, in {tmp_path}" in told.output
    listed = run_here(checkpoints.main, "list", str(tmp_path / "run")).output
    assert f"{away}  on the nodes, in {tmp_path}/nvme" in listed
    (tmp_path / "nvme" / here / "rank-00000.safetensors").write_bytes(b"y")
    told = run_here(checkpoints.main, "verify", str(tmp_path / "run"))
    assert told.code == 1 and f"BAD   {here}" in told.output, told.output
