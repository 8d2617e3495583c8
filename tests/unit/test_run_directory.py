"""Which commits count: the chain of attempts, and fencing on the reader's side."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_shards import signed_json
from data_shards.errors import BadInput
from data_shards.storage import Storage
from launch.job import find_init
from tests.support.tiny import DRAFT
from trainer import checkpoint
from trainer.checkpoint import CheckpointRef, directory_name
from trainer.checkpoint_manifest import KIND, MANIFEST, VERSION, Progress
from trainer.config import CheckpointConfig
from trainer.errors import CheckpointCorrupt, CheckpointOutOfReach, RunHeld
from trainer.rank_file import RankFile
from trainer.retention import Sparing, prune
from trainer.run_directory import AttemptStart, RunDirectory, StopKind, StopRequest, WorkerError, fences
from trainer.survey import (
    NoUsableCheckpoint,
    durable_checkpoints,
    lines_of,
    newest_usable,
    quarantine,
    release,
    survey,
    tip_and_newest,
)


def commit(run: RunDirectory, attempt: str, step: int, files_at: str | None = None, **progress: Any) -> str:
    """A committed checkpoint of one rank with a tiny file."""
    name = directory_name(step, attempt, fast=files_at is not None)
    folder = run.checkpoints.child(name)
    written = folder.write("rank-00000.safetensors", [b"x"])
    hashes = folder.write("rank-00000.hashes", [written.digests])
    entry = RankFile(written.path, written.size, written.block_bytes, hashes)
    progressed = replace(DRAFT, attempt=attempt, progress=Progress(step=step, **progress))
    manifest = replace(progressed, world_size=1, files=(entry,), files_at=files_at)
    folder.write(MANIFEST, [manifest.to_bytes()])
    return name


def found_unusable(run: RunDirectory, parent: AttemptStart, name: str, *, corrupt: bool) -> RunDirectory:
    """An attempt began with this checkpoint, and failed by it."""
    problem = CheckpointCorrupt(name, "a bit") if corrupt else CheckpointOutOfReach(name, "its node is gone")
    start = run.start_attempt(parent, checkpoint.read_manifest(run.checkpoints, name), ())
    run.write_error(start.attempt, WorkerError.of(0, problem))
    return run


def kept_by(run: RunDirectory, attempt: str, sparing: Sparing = Sparing.AS_CONFIGURED, **options: Any) -> list[str]:
    """Folders that are there after pruning."""
    before = run.checkpoints.list()
    removed = prune(run, CheckpointConfig(**options), attempt, sparing)
    stay = run.checkpoints.list()
    assert sorted(stay + removed) == sorted(before)
    return stay


def committed(names: list[str]) -> list[int]:
    return [int(name.split("-")[0]) for name in names]


def steps(run: RunDirectory) -> list[int]:
    return [ref.step for ref in survey(run).usable]


def test_commits_of_a_superseded_attempt_beyond_its_successors_start_are_ignored(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    commit(run, first.attempt, 5)
    second = run.start_attempt(first, durable_checkpoints(run)[-1], ())
    commit(run, first.attempt, 10)  # a zombie of the first attempt goes on committing
    commit(run, second.attempt, 8)
    commit(run, "a-stranger", 20)
    assert steps(run) == [5, 8]
    assert [start.attempt for start in run.lineage()] == [first.attempt, second.attempt]


def test_of_two_launchers_the_later_ones_chain_counts_however_long_the_others_grows(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, (), term=1, claim="z")
    commit(run, first.attempt, 5)
    at_5 = durable_checkpoints(run)[-1]
    later = run.start_attempt(first, at_5, (), term=2, claim="y")
    older: AttemptStart | None = first
    for _ in range(3):
        with pytest.raises(RunHeld, match=later.attempt):
            run.start_attempt(older, at_5, (), term=1, claim="z")
        older = next(
            s for s in run.attempts().values() if s.parent == (older.attempt if older else None) and s.term == 1
        )
        commit(run, older.attempt, 9)
    assert older.number == 4 and [start.attempt for start in run.lineage()] == [first.attempt, later.attempt]
    assert steps(run) == [5] and run.last_term() == 2
    # Equal terms, which should not be: the lower claim, and not now the one and now the other.
    other = run.start_attempt(first, at_5, (), term=2, claim="x")
    with pytest.raises(RunHeld):
        run.start_attempt(later, at_5, (), term=2, claim="y")
    assert [start.attempt for start in run.lineage()] == [first.attempt, other.attempt]


def test_tip_and_newest_are_of_the_same_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt of another launcher begins, at an older step, after the commits were looked at."""
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    for step in (5, 10):
        commit(run, first.attempt, step)
    began: list[AttemptStart] = []

    def newest(*arguments: Any) -> CheckpointRef | None:
        found = newest_usable(*arguments)
        if not began:
            began.append(run.start_attempt(first, durable_checkpoints(run)[0], ()))
        return found

    monkeypatch.setattr("trainer.survey.newest_usable", newest)
    tip, ref = tip_and_newest(run, lambda line: None)
    assert tip == began[0] and ref is not None and ref.step == 5, "of step 10 that chain knows nothing"


def test_of_a_step_the_later_attempts_checkpoint_is_the_newest(tmp_path: Path) -> None:
    """It was made for the evaluation that the earlier one lacks. Names end in what is drawn by chance."""
    run = RunDirectory.at(str(tmp_path))
    tip = run.start_attempt(None, None, ())
    names = [commit(run, tip.attempt, 5)]
    for _ in range(5):
        tip = run.start_attempt(tip, newest_usable(run), ())
        names.append(commit(run, tip.attempt, 5))
        assert newest_usable(run).name == names[-1]  # type: ignore[union-attr]
    assert [ref.name for ref in survey(run).usable] == names
    assert kept_by(run, tip.attempt, keep_last=1) == names[-1:]


def test_fences_hold_over_several_successors(tmp_path: Path) -> None:
    """A commits 10 and 20, both turn out corrupt; the chain goes back to the start. Neither may ever count again, or
    pruning would keep them and delete the good new one."""
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    commit(run, first.attempt, 10)
    commit(run, first.attempt, 20)
    by_step = {ref.step: ref for ref in durable_checkpoints(run)}
    chain = [first]
    for resume_from in (by_step[20], by_step[10], None):
        chain.append(run.start_attempt(chain[-1], resume_from, ()))
    assert list(fences(chain).values()) == [None, 0, 0, 0], "newest first"
    new = commit(run, chain[-1].attempt, 5)
    assert steps(run) == [5]
    assert sorted(kept_by(run, chain[-1].attempt, keep_last=1)) == [new], "what nobody may read is removed"
    assert newest_usable(run).name == new  # type: ignore[union-attr]


def test_nothing_usable_is_an_error_not_a_new_beginning(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    assert newest_usable(run) is None
    start = run.start_attempt(None, None, ())
    name = commit(run, start.attempt, 5)
    with pytest.raises(NoUsableCheckpoint, match=re.escape(f"none of its committed checkpoints can be used ({name}")):
        newest_usable(found_unusable(run, start, name, corrupt=True))
    (tmp_path / "checkpoints" / name / MANIFEST).write_bytes(b"cut off")
    with pytest.raises(NoUsableCheckpoint, match=r"run\.name"):
        newest_usable(run)


def test_what_an_attempt_could_not_use_is_used_again_once_it_is_verified(tmp_path: Path) -> None:
    """Also under torchrun, where nobody puts it in quarantine. Where it fails again, that counts."""
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    name = commit(run, first.attempt, 5)
    found_unusable(run, first, name, corrupt=True)
    assert not survey(run).usable and "a bit" in survey(run).bad[name]
    assert release(run, name) and [ref.name for ref in survey(run).usable] == [name]
    found_unusable(run, run.lineage()[-1], name, corrupt=True)
    quarantine(run, name, "again")
    assert not survey(run).usable


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    start = run.start_attempt(None, None, ())
    for step in (2, 4, 6):
        commit(run, start.attempt, step)
    assert [name[:8] for name in kept_by(run, start.attempt, keep_last=2)] == ["00000004", "00000006"]
    # A newest one that is damaged does not count as kept: the newest valid one must stay.
    (tmp_path / "checkpoints" / directory_name(6, start.attempt) / "rank-00000.safetensors").write_bytes(b"xx")
    assert [name[:8] for name in kept_by(run, start.attempt, keep_last=1)] == ["00000004", "00000006"]
    assert steps(run) == [4]


def test_every_nth_and_the_best_stay_also_on_a_full_disk(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ()).attempt
    losses = {10: 3.0, 20: 1.5, 30: 1.0, 40: 1.5, 50: 2.0, 60: 2.5, 70: 2.75}
    for step, loss in losses.items():
        # At step 30 nothing was evaluated: its loss is that of another step, and no reason to keep it.
        commit(run, attempt, step, eval_loss=loss, eval_step=29 if step == 30 else step)
    options = {"keep_last": 2, "keep_every": 25, "keep_best": 2}
    assert committed(kept_by(run, attempt, **options)) == [20, 30, 40, 50, 60, 70]
    assert committed(kept_by(run, attempt, Sparing.NEWEST, **options)) == [20, 30, 40, 50, 70]
    assert committed(kept_by(run, attempt, Sparing.NEWEST, keep_last=3)) == [70]


def test_what_killed_saves_left_is_removed_by_the_next_attempt_alone(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    kept = commit(run, first.attempt, 5)
    for folder in (directory_name(8, first.attempt), "my-notes", directory_name(9, "a-stranger")):
        run.checkpoints.child(folder).write("rank-00000.safetensors", [b"half"])
    assert len(kept_by(run, first.attempt, keep_last=1)) == 4, "its own save may be under way"
    second = run.start_attempt(first, survey(run).usable[-1], ())
    under_way = directory_name(10, second.attempt)
    run.checkpoints.child(under_way).write("rank-00000.safetensors", [b"half"])
    assert len(kept_by(run, first.attempt, keep_last=1)) == 5, "a zombie removes nothing of its successor"
    assert kept_by(run, second.attempt, keep_last=1) == sorted(
        [kept, directory_name(9, "a-stranger"), under_way, "my-notes"]
    )


def test_quarantine_outlives_the_submission_and_ends_by_verification(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ()).attempt
    commit(run, attempt, 5)
    newest = commit(run, attempt, 10)
    quarantine(run, newest, "block 0 does not match")
    assert steps(run) == [5] and newest_usable(run).step == 5  # type: ignore[union-attr]
    assert "quarantined" in lines_of(survey(run))[0] and "block 0 does not match" in lines_of(survey(run))[0]
    assert newest in kept_by(run, attempt, keep_last=1), "it is kept for people"
    (tmp_path / "checkpoints" / newest / "quarantine.json").write_text("{")  # a marker that was cut off is one too
    assert steps(run) == [5]
    assert release(run, newest) and steps(run) == [5, 10] and not release(run, newest)


def test_quarantined_ones_stay_when_a_successor_has_made_them_late(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    commit(run, first.attempt, 5)
    bad = commit(run, first.attempt, 10)
    quarantine(run, bad, "block 0 does not match")
    second = run.start_attempt(first, newest_usable(run), ())
    commit(run, second.attempt, 10)
    assert bad in kept_by(run, second.attempt, keep_last=1) and steps(run) == [10]
    assert bad not in kept_by(run, second.attempt, Sparing.NEWEST, keep_last=1), "the disk is full"
    assert steps(run) == [10]


def test_checkpoints_that_are_gone_are_no_reason_to_start_anew(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    commit(run, first.attempt, 5)
    run.start_attempt(first, newest_usable(run), ())
    late = commit(run, first.attempt, 10)
    shutil.rmtree(tmp_path / "checkpoints" / directory_name(5, first.attempt))
    with pytest.raises(NoUsableCheckpoint, match="they are gone"):
        newest_usable(run)
    shutil.rmtree(tmp_path / "attempts")
    with pytest.raises(NoUsableCheckpoint, match=late):
        newest_usable(run)


def test_what_cannot_be_removed_keeps_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ()).attempt
    for step in (2, 4, 6):
        commit(run, attempt, step)
    delete = Storage.delete_file

    def refusing(storage: Storage, relative: str) -> None:
        if storage.uri.endswith(directory_name(2, attempt)):
            raise PermissionError(13, "Permission denied", relative)
        delete(storage, relative)

    monkeypatch.setattr(Storage, "delete_file", refusing)
    with pytest.raises(PermissionError):
        prune(run, CheckpointConfig(keep_last=1), attempt)
    assert steps(run) == [2, 6]


def test_a_copied_folder_is_not_taken_for_another_step(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ()).attempt
    name = commit(run, attempt, 5)
    shutil.copytree(tmp_path / "checkpoints" / name, tmp_path / "checkpoints" / directory_name(50, attempt))
    found = survey(run)
    assert [ref.step for ref in found.usable] == [5]
    assert f"its manifest is that of {name}" in found.bad[directory_name(50, attempt)]


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {"step": "10"}},
        {"progress": {"step": True}},
        {"progress": {"step": 10, "eval_loss": "low"}},
        {"world_size": 1.0},
        {"attempt": 7},
    ],
)
def test_a_manifest_with_a_field_of_another_type_is_passed_over(tmp_path: Path, change: dict[str, Any]) -> None:
    """Though it was signed."""
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ()).attempt
    commit(run, attempt, 5)
    folder = run.checkpoints.child(commit(run, attempt, 10))
    body = signed_json.decode(folder.read(MANIFEST), KIND, VERSION, "here")
    folder.write(MANIFEST, [signed_json.encode(body | change, KIND, VERSION)])
    found = survey(run)
    assert [ref.step for ref in found.usable] == [5] and "of the wrong type" in "".join(found.bad.values())


def test_an_unfinished_start_is_no_attempt(tmp_path: Path) -> None:
    run = RunDirectory.at(str(tmp_path))
    assert run.lineage() == [] and durable_checkpoints(run) == []
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


def test_an_error_report_that_is_cut_off_does_not_keep_a_run_from_going_on(tmp_path: Path) -> None:
    """As an upload leaves it whose process was killed."""
    run = RunDirectory.at(str(tmp_path))
    first = run.start_attempt(None, None, ())
    name = commit(run, first.attempt, 5)
    second = run.start_attempt(first, checkpoint.read_manifest(run.checkpoints, name), ())
    run.write_error(second.attempt, WorkerError.of(1, BadInput("whole")))
    run.attempt(second.attempt).write("errors/rank-00000.json", [b'{"rank": 0, "ty'])
    assert [error.message for error in run.errors_of(second.attempt)] == ["whole"]
    newest = newest_usable(run)
    assert newest is not None and newest.name == name


def test_a_notice_that_is_cut_off_hides_no_other(tmp_path: Path) -> None:
    """Its writer's machine was about to go."""
    run = RunDirectory.at(str(tmp_path))
    leaving = StopRequest("the machine goes away", StopKind.PREEMPTED, 17.5)
    run.notify("a1", 1, "node-7", leaving)
    run.attempt("a1").write("notices/rank-00000.json", [b'{"reason": "the mach'])
    assert run.notices("a1") == {"node-7": leaving}
