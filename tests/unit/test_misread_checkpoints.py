"""One bad read condemns no checkpoint: it is read again, and the driver looks itself before it believes a worker."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.attempts import Submission, run_attempts
from cluster.failures import Action, Decision, decide
from cluster.lease import holding
from data_shards import verified_reader
from data_shards.errors import CorruptFile
from data_shards.retry import Patience
from data_shards.storage import Storage
from tests.unit.test_corrupt_checkpoints import WORLD_SIZE, load, write
from trainer.checkpoint import rank_file, read_manifest
from trainer.checkpoint_manifest import MANIFEST
from trainer.errors import CheckpointCorrupt
from trainer.run_directory import RunDirectory, WorkerError, read_json, write_json
from trainer.survey import QUARANTINE, survey


def silent(line: str) -> None:
    pass


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.fixture(autouse=True)
def soon_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_shards.storage.A_MOMENT", Patience(total_s=0.3, first_pause_s=0.05))


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """With checkpoints of steps 5 and 10."""
    run = RunDirectory.at(str(tmp_path))
    attempt = run.start_attempt(None, None, ()).attempt
    for step in (5, 10):
        write(run, attempt, step)
    return run


def newest(run: RunDirectory) -> str:
    return run.checkpoints.list()[-1]


class Failing:
    """Something that fails so many times before it works."""

    def __init__(self, works: Callable[..., Any], error: Exception, times: int) -> None:
        self._works, self._error, self.left = works, error, times

    def __call__(self, *arguments: Any) -> Any:
        if self.left:
            self.left -= 1
            raise self._error
        return self._works(*arguments)


def test_a_moments_io_error_under_a_manifest(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = Failing(Storage._read, OSError(errno.EIO, "Input/output error"), 2)
    monkeypatch.setattr(Storage, "_read", lambda storage, relative: failing(storage, relative))
    assert [ref.step for ref in survey(run).usable] == [5, 10] and not failing.left


def test_a_disk_that_is_broken_for_good(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passed over as one that fails, though the error was told in other words."""
    name, read = newest(run), Storage._read

    def broken(storage: Storage, relative: str) -> bytes:
        if storage.uri.endswith(name) and relative == MANIFEST:
            raise OSError(errno.EIO, "Input/output error")
        return read(storage, relative)

    monkeypatch.setattr(Storage, "_read", broken)
    with pytest.raises(OSError, match=r"manifest\.json failed") as raised:
        read_manifest(run.checkpoints, name)
    assert raised.value.errno == errno.EIO
    found = survey(run)
    assert [ref.step for ref in found.usable] == [5] and "Input/output error" in found.bad[name]


def test_io_errors_under_blocks(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, preadv = survey(run).usable[-1], os.preadv
    failing = Failing(preadv, OSError(errno.EIO, "Input/output error"), 2)
    monkeypatch.setattr(os, "preadv", failing)
    load(run, ref, WORLD_SIZE)
    assert not failing.left
    failing.left = 10**6
    with pytest.raises(CheckpointCorrupt, match=r"its disk fails: reading .*/rank-0.* failed \d+ times"):
        load(run, ref, WORLD_SIZE)


@pytest.mark.parametrize("times", [verified_reader._REREADS, verified_reader._REREADS + 1])
def test_blocks_that_do_not_match_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    storage, data = Storage.at(tmp_path), bytes(range(256)) * 999
    reader = verified_reader.VerifiedReader(storage, storage.write("file", [data]))
    preadv, left, forgotten = os.preadv, times, []

    def misread(descriptor: int, views: list[memoryview], start: int) -> int:
        nonlocal left
        got = preadv(descriptor, views, start)
        if left and start == 0:
            left -= 1
            views[0][0] ^= 1
        return got

    monkeypatch.setattr(os, "preadv", misread)
    monkeypatch.setattr(os, "posix_fadvise", lambda *asked: forgotten.append(asked[-1]))
    if times > verified_reader._REREADS:
        with pytest.raises(CorruptFile, match="block 0"):
            reader.read(300, 600)
    else:
        assert reader.read(300, 600) == data[300:600]
    assert forgotten == [os.POSIX_FADV_DONTNEED] * verified_reader._REREADS


@dataclass
class Workers:
    """Stands in for a launcher: its attempts find a checkpoint to be corrupt, so many of them; the next one ends."""

    run_directory: RunDirectory
    told: str
    failures: int
    began: list[int]

    def wait_for_room(self, cancelled: Callable[[], bool], say: Any) -> int:
        return WORLD_SIZE

    def run(self, spec: tuple[str, Any], num_workers: int, notify: Any) -> str:
        attempt, ref = spec
        self.began.append(ref.step)
        folder = self.run_directory.attempt(attempt)
        if len(self.began) > self.failures:
            write_json(folder, "end.json", {"outcome": "finished"})
            return ""
        write_json(folder, "workers/rank-00001.json", {"node": "0123abcd", "host": "gpu-7"})
        problem = CheckpointCorrupt(ref.name, self.told)
        self.run_directory.write_error(attempt, WorkerError.of(1, problem))
        return "rank 1 exited with 1"


Attempted = Callable[..., tuple[Submission, list[int]]]
"""The submission's end, and the steps from which its attempts began."""


@pytest.fixture
def attempted(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> Attempted:
    monkeypatch.setattr("cluster.attempts.decide", without_delay)

    def attempted(told: str, failures: int = 1) -> tuple[Submission, list[int]]:
        workers = Workers(run, told, failures, [])
        with holding(run, silent) as lease:
            done = run_attempts(
                run,
                workers,  # type: ignore[arg-type]
                lambda attempt, ref: (attempt, ref),  # type: ignore[arg-type, return-value]
                lease=lease,
                max_failures_without_progress=2,
                say=silent,
            )
        return done, workers.began

    return attempted


def without_delay(*arguments: Any, **options: Any) -> Decision:
    return replace(decide(*arguments, **options), delay_s=0.0)


def test_what_reads_back_well_here_is_used_again(run: RunDirectory, attempted: Attempted, tmp_path: Path) -> None:
    """Also where a file is bad that nobody has named: all of a huge checkpoint is not read."""
    name = newest(run)
    damage(tmp_path / "checkpoints" / name / rank_file(0))
    done, began = attempted(f"{rank_file(1)}: block 0 does not match its hash")
    assert done.decision.action == Action.FINISH and began == [10, 10]
    assert read_json(run.checkpoints.child(name), QUARANTINE) is None
    failed = run.lineage()[-2].attempt
    reason = read_json(run.attempt(failed), "decision.json")["decision"]["reason"]  # type: ignore[index]
    assert "block 0 does not match" in reason and "look at rank 1's node gpu-7" in reason


@pytest.mark.parametrize("told", [f"{rank_file(0)}: block 0 does not match its hash", "its disk fails"])
def test_what_is_bad_here_too_is_put_in_quarantine(
    run: RunDirectory, attempted: Attempted, tmp_path: Path, told: str
) -> None:
    name = newest(run)
    damage(tmp_path / "checkpoints" / name / rank_file(0))
    done, began = attempted(told)
    assert done.decision.action == Action.FINISH and began == [10, 5]
    assert told in read_json(run.checkpoints.child(name), QUARANTINE)["reason"]  # type: ignore[index]


def test_a_node_that_misreads_again_and_again_ends_the_run(run: RunDirectory, attempted: Attempted) -> None:
    done, began = attempted(f"{rank_file(0)}: block 0 does not match its hash", failures=99)
    assert done.decision.action == Action.FAIL and began == [10, 10, 10]
    assert "max_failures_without_progress" in done.decision.reason and "gpu-7" in done.decision.reason
    assert done.checkpoint is not None and done.checkpoint.step == 10
