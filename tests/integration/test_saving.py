"""Saves behind training: what is written is the state of their step, and a save that fails costs that save alone."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from data_shards.errors import BadInput
from data_shards.order.sampler import Sampler
from data_shards.storage import Storage
from tests.support.checkpoints import committed
from tests.support.disk import disk_of
from tests.support.distributed import run_workers
from tests.support.engines import ADAMW, make_engine
from tests.support.saving_loop import (
    PACKS,
    FailingDisk,
    Setting,
    committed_steps,
    draft_of,
    last_files,
    looped,
    recorded_steps,
    saver_of,
)
from tests.support.tiny import save_now, save_tiny_model
from trainer import checkpoint
from trainer.checkpoint_manifest import Progress
from trainer.engine import ZeroEngine
from trainer.loop import Outcome
from trainer.saving import SaveFailed
from trainer.shared_storage import check_shared
from trainer.step import train_step

ROOM_BESIDE = 100_000
"""Bytes for step records, and for what a save is taken to need beside its elements: together with half a checkpoint
more than that, and yet less than a whole one, so that no save fits that should not."""


def steps(engine: ZeroEngine, start: int, stop: int) -> None:
    sampler = Sampler(num_rows=19, seed=5, global_batch=6, total_rows=120)
    for step in range(start, stop):
        rows = sampler.rows_of_step(step)
        train_step(engine, PACKS, rows, step=step, seed=5, micro_batch_size=2, learning_rate=ADAMW.lr)


def save_behind_training(base: str, behind: str, at_once: str) -> tuple[int, float, bool]:
    """Two saves of step 2: one that waits, and one that is held back until step 5 is done. Then one of step 5."""
    engine, let_go = make_engine(base, ADAMW), threading.Event()
    steps(engine, 0, 2)
    save_now(engine, Storage.at(at_once), draft_of(Progress(step=2)))
    FailingDisk(held=let_go)
    saver = saver_of(engine, Storage.at(behind))
    reserved = saver.staging.nbytes
    saver.begin(draft_of(Progress(step=2)))
    steps(engine, 2, 5)
    still = saver.busy and saver.ended() is None
    with pytest.raises(RuntimeError, match="two must not overlap"):
        saver.begin(draft_of(Progress(step=5)))
    let_go.set()
    first = saver.finish()
    saver.begin(draft_of(Progress(step=5)))
    second = saver.finish()
    assert first.error is second.error is None and saver.staging.nbytes == reserved
    return reserved, first.seconds, still


def test_what_is_written_is_the_state_of_its_step(tiny: str, tmp_path: Path) -> None:
    behind, at_once = tmp_path / "behind", tmp_path / "at_once"
    results = run_workers(save_behind_training, 2, tiny, str(behind), str(at_once))
    assert all(still for _, _, still in results) and all(reserved > 0 for reserved, *_ in results)
    (wanted,) = committed(Storage.at(at_once))
    found, later = committed(Storage.at(behind))
    assert found.manifest.files == wanted.manifest.files != later.manifest.files
    assert found.manifest.optimizer == wanted.manifest.optimizer and later.step == 5
    for name in (found.name, later.name):
        checkpoint.verify(Storage.at(behind), name)
    files = sum(path.stat().st_size for path in (behind / found.name).glob("rank-*"))
    assert 0 < files - sum(reserved for reserved, *_ in results) < 20_000, "room was made for just what is written"


def copied_late(base: str, behind: str, at_once: str) -> tuple[float, bool]:
    """The copies begin only when the next step's forward and backward are long done."""
    engine = make_engine(base, ADAMW)
    steps(engine, 0, 2)
    save_now(engine, Storage.at(at_once), draft_of(Progress(step=2)))
    saver = saver_of(engine, Storage.at(behind))
    begin_copy = saver.staging.begin_copy

    def begin_late_copy(slices: Any) -> Any:
        copy = begin_copy(slices)
        return lambda: (time.sleep(1.0), copy())[1]

    saver.staging.begin_copy = begin_late_copy  # type: ignore[method-assign]
    saver.begin(draft_of(Progress(step=2)))
    began = saver.stall_seconds
    steps(engine, 2, 4)
    waited = saver.stall_seconds - began
    return waited, saver.finish().error is None


def test_an_update_waits_until_what_it_changes_is_copied(tiny: str, tmp_path: Path) -> None:
    behind, at_once = tmp_path / "behind", tmp_path / "at_once"
    for waited, well in run_workers(copied_late, 2, tiny, str(behind), str(at_once)):
        assert well and 0.2 < waited < 1.5
    ((wanted,), (found,)) = committed(Storage.at(at_once)), committed(Storage.at(behind))
    assert found.manifest.files == wanted.manifest.files and found.manifest.optimizer == wanted.manifest.optimizer


def copy_fails(base: str, root: str) -> tuple[str, float]:
    engine = make_engine(base, ADAMW)
    steps(engine, 0, 1)
    saver = saver_of(engine, Storage.at(root))
    if engine.rank == 1:

        def no_copy() -> Any:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        saver.staging.begin_copy = lambda slices: no_copy  # type: ignore[method-assign]
    saver.begin(draft_of(Progress(step=1)))
    steps(engine, 1, 2)
    return str(saver.finish().error), saver.stall_seconds


def test_a_copy_that_fails_costs_its_save_and_no_step_waits_for_it(tiny: str, tmp_path: Path) -> None:
    (zero, _), (one, stalled) = run_workers(copy_fails, 2, tiny, str(tmp_path))
    assert "illegal memory access" in one and "could not write its part" in zero and stalled < 5
    assert committed(Storage.at(tmp_path)) == []


def failing_part(base: str, root: str) -> tuple[str, int]:
    """Rank 1 can't write its part."""
    engine = make_engine(base, ADAMW)
    steps(engine, 0, 1)
    disk = FailingDisk(fails_at=(1,) if engine.rank == 1 else ())
    saver = saver_of(engine, Storage.at(root), commit_timeout_s=600)
    saver.begin(draft_of(Progress(step=1)))
    return str(saver.finish().error), disk.fired


def test_what_fails_on_one_rank_has_failed_on_all(tiny: str, tmp_path: Path) -> None:
    started = time.monotonic()
    (zero, _), (one, fired) = run_workers(failing_part, 2, tiny, str(tmp_path))
    assert fired == 1 and "Input/output error" in one and "could not write its part" in zero
    assert time.monotonic() - started < 120, "the receipt was waited for"
    assert committed(Storage.at(tmp_path)) == []


def hung_storage(base: str, root: str) -> tuple[str, float]:
    """Rank 1's write never ends."""
    engine = make_engine(base, ADAMW)
    steps(engine, 0, 1)
    if engine.rank == 1:
        FailingDisk(held=threading.Event())
    saver = saver_of(engine, Storage.at(root), commit_timeout_s=1)
    saver.begin(draft_of(Progress(step=1)))
    started = time.monotonic()
    with pytest.raises(SaveFailed) as caught:
        saver.finish()
    return str(caught.value), time.monotonic() - started


def test_storage_that_hangs_does_not_hang_the_end(tiny: str, tmp_path: Path) -> None:
    for message, seconds in run_workers(hung_storage, 2, tiny, str(tmp_path)):
        assert "has not ended within 2 s" in message and "hangs or is far too slow" in message and seconds < 30


def lost_receipt(base: str, root: str) -> str:
    """Each rank writes to a disk of its own."""
    engine = make_engine(base, ADAMW)
    steps(engine, 0, 1)
    saver = saver_of(engine, Storage.at(f"{root}/{engine.rank}"), commit_timeout_s=0.5)
    saver.begin(draft_of(Progress(step=1)))
    return str(saver.finish().error)


def test_a_receipt_that_does_not_come_is_given_up(tiny: str, tmp_path: Path) -> None:
    zero, one = run_workers(lost_receipt, 2, tiny, str(tmp_path))
    assert "nothing came from rank 1 within 0 s" in zero and "commit_timeout_s" in zero
    assert "failed on another rank" in one


def no_retention() -> None:
    raise PermissionError(13, "Permission denied")


def test_training_goes_on_after_a_failed_save(tiny: str, tmp_path: Path) -> None:
    results = run_workers(looped, 2, tiny, str(tmp_path), Setting(disk={"fails_at": (4, 12, 16)}))
    assert [outcome for outcome, *_ in results] == [Outcome.FINISHED] * 2 and results[1].fired == 3
    assert committed_steps(tmp_path) == [8, 20, 24]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["00000008-a1", "00000020-a1", "00000024-a1"], "nothing is left of those that failed"
    assert recorded_steps(tmp_path) == list(range(1, 25))


def test_retention_that_fails_costs_no_save(tiny: str, tmp_path: Path) -> None:
    results = run_workers(looped, 2, tiny, str(tmp_path), Setting(retention=no_retention))
    assert [outcome for outcome, *_ in results] == [Outcome.FINISHED] * 2
    assert committed_steps(tmp_path) == [4, 8, 12, 16, 20, 24]
    assert len(results[0].warned) == 6 and "old checkpoints could not be removed: [Errno 13]" in results[0].warned[0]


def test_three_failures_in_a_row_end_the_attempt_on_all_ranks(tiny: str, tmp_path: Path) -> None:
    (zero, step, *_), (one, same_step, fired, *_) = run_workers(
        looped, 2, tiny, str(tmp_path), Setting(disk={"fails_at": (8, 12, 16)})
    )
    assert "3 saves in a row failed, the last that of step 16" in zero and zero == one
    assert step == same_step and fired == 3 and committed_steps(tmp_path) == [4]


def test_the_last_save_must_succeed(tiny: str, tmp_path: Path) -> None:
    results = run_workers(looped, 2, tiny, str(tmp_path), Setting(disk={"fails_at": (20, 24)}))
    assert all("step 24 could not be saved" in outcome for outcome, *_ in results) and results[1].fired == 2
    assert committed_steps(tmp_path) == [4, 8, 12, 16]
    assert not (tmp_path / "checkpoints" / "00000020-a1").exists(), "removed before the next save"


def test_a_save_that_is_due_too_early_is_left_out(tiny: str, tmp_path: Path) -> None:
    """Step 4's save takes until step 14, so 8 and 12 are not saved, and nothing queues up."""
    results = run_workers(looped, 2, tiny, str(tmp_path), Setting(held_until=14))
    assert [outcome for outcome, *_ in results] == [Outcome.FINISHED] * 2
    found = committed_steps(tmp_path)
    assert found[0] == 4 and found[-1] == 24 and not {8, 12} & set(found)


def cut_short(base: str, root: str) -> bool:
    """Training ends by an error while a save is under way."""
    engine = make_engine(base, ADAMW)
    steps(engine, 0, 1)
    let_go = threading.Event()
    FailingDisk(held=let_go)
    saver = saver_of(engine, Storage.at(root))
    saver.begin(draft_of(Progress(step=1)))
    threading.Timer(0.5, let_go.set).start()
    saver.close()
    return saver.busy


def test_an_error_does_not_cost_the_save_under_way(tiny: str, tmp_path: Path) -> None:
    assert run_workers(cut_short, 2, tiny, str(tmp_path / "checkpoints")) == [False, False]
    assert committed_steps(tmp_path) == [1]


@pytest.fixture(scope="module")
def undisturbed(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without trouble."""
    root = tmp_path_factory.mktemp("undisturbed")
    run_workers(looped, 2, tiny, str(root), Setting())
    return root


@pytest.fixture(scope="module")
def saved_bytes(undisturbed: Path) -> int:
    """On disk, of one checkpoint."""
    return sum(path.stat().st_blocks * 512 for path in (undisturbed / "checkpoints" / "00000024-a1").rglob("*"))


def test_on_a_full_disk_the_reserve_makes_room(tiny: str, tmp_path: Path, saved_bytes: int) -> None:
    """Room for two checkpoints and a half where three are to be kept."""
    with disk_of(tmp_path / "disk", saved_bytes * 5 // 2 + ROOM_BESIDE) as root:
        results = run_workers(looped, 2, tiny, str(root), Setting(saves={"keep_last": 3}))
        assert [outcome for outcome, *_ in results] == [Outcome.FINISHED] * 2
        made_room = [line for line in results[0].warned if "the disk is full: removed 000000" in line]
        assert made_room, results[0].warned  # how often: steps are faster than the look at the disk
        assert committed_steps(root)[-1] == 24 and len(committed_steps(root)) == 2
        for ref in committed(Storage.at(root / "checkpoints")):
            checkpoint.verify(Storage.at(root / "checkpoints"), ref.name)


def test_where_nothing_may_be_removed_the_attempt_ends_and_nothing_is_lost(
    tiny: str, tmp_path: Path, saved_bytes: int
) -> None:
    with disk_of(tmp_path / "disk", saved_bytes * 3 // 2 + ROOM_BESIDE) as root:
        (zero, step, *_), (one, same_step, *_) = run_workers(
            looped, 2, tiny, str(root), Setting(saves={"keep_last": 3})
        )
        assert "is full and nothing more may be removed" in zero and zero == one
        assert 8 <= step == same_step < 24 and committed_steps(root) == [4]
        checkpoint.verify(Storage.at(root / "checkpoints"), "00000004-a1")
        assert sorted(path.name for path in (root / "checkpoints").iterdir()) == ["00000004-a1"]


def test_a_quota_that_only_a_write_tells_of(tiny: str, tmp_path: Path) -> None:
    """Free space is shown, yet a write is refused: the reserve goes, and the next step is saved instead."""
    disk = {"fails_at": (12,), "errno": errno.EDQUOT}
    results = run_workers(looped, 2, tiny, str(tmp_path), Setting(disk=disk, saves={"keep_last": 2}))
    assert [outcome for outcome, *_ in results] == [Outcome.FINISHED] * 2 and results[1].fired == 1
    assert any("removed 00000004-a1 to make room" in line for line in results[0].warned)
    recorded = recorded_steps(tmp_path)
    assert recorded == list(range(1, 25)) and committed_steps(tmp_path)[-1] == 24


def test_a_quota_that_nothing_can_relieve(tiny: str, tmp_path: Path) -> None:
    disk = {"fails_at": tuple(range(5, 25)), "errno": errno.ENOSPC}
    results = run_workers(looped, 2, tiny, str(tmp_path), Setting(disk=disk, saves={"keep_last": 2}))
    assert all("nothing more may be removed" in outcome for outcome, *_ in results) and results[1].fired == 1
    assert committed_steps(tmp_path) == [4]


def test_the_last_save_finds_no_room_and_makes_some(tiny: str, tmp_path: Path, undisturbed: Path) -> None:
    disk = {"fails_at": (24,), "errno": errno.ENOSPC, "times": 1}
    results = run_workers(looped, 2, tiny, str(tmp_path), Setting(disk=disk, saves={"keep_last": 2}))
    assert [result.outcome for result in results] == [Outcome.FINISHED] * 2 and results[1].fired == 1
    assert any("removed 00000016-a1 to make room" in line for line in results[0].warned)
    assert committed_steps(tmp_path) == [20, 24] and recorded_steps(tmp_path) == list(range(1, 25))
    checkpoint.verify(Storage.at(tmp_path / "checkpoints"), "00000024-a1")
    assert last_files(tmp_path) == last_files(undisturbed)


def test_the_last_save_finds_no_room_and_none_can_be_made(tiny: str, tmp_path: Path) -> None:
    """Once the reserve is gone, only a person can help; the newest one stays."""
    disk = {"fails_at": (24,), "errno": errno.ENOSPC}
    results = run_workers(looped, 2, tiny, str(tmp_path), Setting(disk=disk, saves={"keep_last": 2}))
    assert all(result.outcome.startswith("DiskFull: ") for result in results) and results[1].fired == 2
    assert "nothing more may be removed" in results[0].outcome
    assert results[0].step == results[1].step == 24 and committed_steps(tmp_path) == [20]
    checkpoint.verify(Storage.at(tmp_path / "checkpoints"), "00000020-a1")


def look_for_marks(roots: list[str]) -> str:
    rank = torch.distributed.get_rank()
    try:
        check_shared(Storage.at(roots[rank]), rank, len(roots), patience_s=0.2)
    except BadInput as error:
        return str(error)
    return ""


def test_storage_that_is_not_shared_is_refused_at_the_start(tmp_path: Path) -> None:
    """Three workers on two nodes, each with a folder of its own under the same path; then with one for all."""
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    messages = run_workers(look_for_marks, 3, [one, one, two])
    assert all("what rank 0, 2 of 3 wrote there" in each and "Set run.storage" in each for each in messages)
    assert run_workers(look_for_marks, 3, [str(tmp_path / "shared")] * 3) == ["", "", ""]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("base")))
