"""Which commits count: the chain of attempts, and fencing on the reader's side."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from data_shards.errors import BadInput
from launch.job import find_init
from tests.support.tiny import DRAFT
from trainer.checkpoint import directory_name
from trainer.checkpoint_manifest import MANIFEST, Progress
from trainer.run_directory import NoUsableCheckpoint, RunDirectory, fences


def commit(run: RunDirectory, attempt: str, step: int) -> str:
    """A committed checkpoint of one rank with an empty file."""
    name = directory_name(step, attempt)
    folder = run.checkpoints.child(name)
    entry = folder.write("rank-00000.safetensors", [b"x"])
    manifest = replace(DRAFT, attempt=attempt, progress=Progress(step=step), world_size=1, files=(entry,))
    folder.write(MANIFEST, [manifest.to_bytes()])
    return name


def steps(run: RunDirectory) -> list[int]:
    return [ref.step for ref in run.usable_checkpoints(report=lambda line: None)]


def test_commits_of_a_superseded_attempt_beyond_its_successors_start_are_ignored(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    commit(run, first.attempt, 5)
    second = run.start_attempt(first, run.usable_checkpoints()[-1], ())
    commit(run, first.attempt, 10)  # a zombie of the first attempt goes on committing
    commit(run, second.attempt, 8)
    commit(run, "a-stranger", 20)
    assert steps(run) == [5, 8]
    assert [start.attempt for start in run.lineage()] == [first.attempt, second.attempt]


def test_fences_hold_over_several_successors(tmp_path: Path) -> None:
    """A commits 10 and 20, both turn out corrupt; the chain goes back to the start. Neither may ever count again, or
    pruning would keep them and delete the good new one."""
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    commit(run, first.attempt, 10)
    commit(run, first.attempt, 20)
    by_step = {ref.step: ref for ref in run.usable_checkpoints()}
    chain = [first]
    for resume_from in (by_step[20], by_step[10], None):
        chain.append(run.start_attempt(chain[-1], resume_from, ()))
    assert list(fences(chain).values()) == [None, 0, 0, 0], "newest first"
    new = commit(run, chain[-1].attempt, 5)
    assert steps(run) == [5] and run.prune(1) == []
    assert run.newest().name == new  # type: ignore[union-attr]


def test_nothing_usable_is_an_error_not_a_new_beginning(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    assert run.newest() is None
    start = run.start_attempt(None, None, ())
    name = commit(run, start.attempt, 5)
    with pytest.raises(NoUsableCheckpoint, match=re.escape(f"none of its committed checkpoints can be used ({name}")):
        run.newest(excluded=frozenset({name}))
    (tmp_path / "checkpoints" / name / MANIFEST).write_bytes(b"cut off")
    with pytest.raises(NoUsableCheckpoint, match=r"run\.name"):
        run.newest()


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    start = run.start_attempt(None, None, ())
    for step in (2, 4, 6):
        commit(run, start.attempt, step)
    assert [name[:8] for name in run.prune(2)] == ["00000002"]
    assert steps(run) == [4, 6]
    # A newest one that is damaged does not count as kept: the newest valid one must stay.
    (tmp_path / "checkpoints" / directory_name(6, start.attempt) / "rank-00000.safetensors").write_bytes(b"xx")
    assert run.prune(1) == [] and steps(run) == [4]


def test_an_unfinished_start_is_no_attempt(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    assert run.lineage() == [] and run.usable_checkpoints() == []
    (tmp_path / "attempts" / "half").mkdir(parents=True)
    assert run.lineage() == []


def test_init_from_names_the_newest_checkpoint_or_that_of_a_step(tmp_path: Path) -> None:
    folder = tmp_path / "me@10" / "run"  # only what ends the name is a step
    run = RunDirectory.at(str(folder))
    attempt = run.start_attempt(None, None, ()).attempt
    old, new = commit(run, attempt, 5), commit(run, attempt, 10)
    assert find_init(str(folder)) == f"{folder}/checkpoints/{new}"
    assert find_init(f"{folder}@5") == f"{folder}/checkpoints/{old}"
    with pytest.raises(BadInput, match=r"run@7': no such checkpoint; committed steps there: 5, 10"):
        find_init(f"{folder}@7")
