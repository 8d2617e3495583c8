"""One node's bad read of the data ends no run: the driver looks itself before it believes a worker."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.attempts import Submission, run_attempts
from cluster.failures import Action
from cluster.lease import holding
from data_shards.errors import DatasetCorrupt
from data_shards.storage import Storage
from tests.support.datasets import random_packs, write_dataset
from tests.unit.test_misread_checkpoints import damage, silent, without_delay
from trainer.run_directory import RunDirectory, WorkerError, read_json, write_json


@dataclass
class Workers:
    """Stands in for a launcher: rank 1 of its attempts finds a file of the data to be corrupt, so many times; the next
    attempt ends."""

    run_directory: RunDirectory
    data: Storage
    file: str
    failures: int
    began: int = 0

    def wait_for_room(self, cancelled: Callable[[], bool], say: Any) -> int:
        return 2

    def run(self, spec: Any, num_workers: int, notify: Any) -> str:
        self.began += 1
        folder = self.run_directory.attempt(spec.attempt)
        if self.began > self.failures:
            write_json(folder, "end.json", {"outcome": "finished"})
            return ""
        write_json(folder, "workers/rank-00001.json", {"node": "0123abcd", "host": "gpu-7"})
        problem = f"{self.data.uri_of(self.file)}: block 0 does not match its hash"
        error = DatasetCorrupt(self.data.uri, self.file, problem)
        self.run_directory.write_error(spec.attempt, WorkerError.of(1, error, step=3))
        return "rank 1 exited with 1"


@pytest.fixture
def data(tmp_path: Path) -> Storage:
    storage = Storage.at(tmp_path / "data")
    write_dataset(storage, random_packs(300, 64), 64, 11_000)
    return storage


FILES = ["train-00000.arrow", "train-counts.arrow"]


@pytest.fixture
def attempted(tmp_path: Path, data: Storage, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Submission, int]]:
    monkeypatch.setattr("cluster.attempts.decide", without_delay)
    run = RunDirectory.at(str(tmp_path / "run"))

    def attempted(file: str, failures: int = 1) -> tuple[Submission, int]:
        """The submission's end, and how many attempts there were."""
        workers = Workers(run, data, file, failures)
        with holding(run, silent) as lease:
            done = run_attempts(
                run,
                workers,  # type: ignore[arg-type]
                lambda attempt, ref: SimpleNamespace(attempt=attempt, dataset_uri=data.uri),  # type: ignore[arg-type, return-value]
                lease=lease,
                max_failures_without_progress=2,
                say=silent,
            )
        return done, workers.began

    return attempted


Attempted = Callable[..., tuple[Submission, int]]


def reason_of(tmp_path: Path, attempt: int) -> str:
    run = RunDirectory.at(str(tmp_path / "run"))
    return str(read_json(run.attempt(run.lineage()[attempt].attempt), "decision.json")["decision"]["reason"])  # type: ignore[index]


@pytest.mark.parametrize("file", FILES)
def test_what_is_good_here_is_tried_again(attempted: Attempted, tmp_path: Path, file: str) -> None:
    done, began = attempted(file)
    assert done.decision.action == Action.FINISH and began == 2
    reason = reason_of(tmp_path, 0)
    assert f"/{file} was not what its manifest says; the driver reads it as it was written" in reason
    assert "look at rank 1's node gpu-7" in reason and "delete" not in reason


@pytest.mark.parametrize("file", FILES)
def test_what_is_bad_here_too_ends_the_run(attempted: Attempted, data: Storage, tmp_path: Path, file: str) -> None:
    damage(tmp_path / "data" / file)
    done, began = attempted(file)
    assert done.decision.action == Action.FAIL and began == 1
    assert f"/{file}: block 0" in done.decision.reason and "gpu-7" not in done.decision.reason
    assert f"To prepare the dataset anew, delete {data.uri} and run the same command" in done.decision.reason


def test_data_that_is_gone_ends_the_run(attempted: Attempted, tmp_path: Path) -> None:
    (tmp_path / "data" / "manifest.json").unlink()
    done, began = attempted(FILES[0])
    assert done.decision.action == Action.FAIL and began == 1 and "delete" in done.decision.reason


def test_a_node_that_misreads_again_and_again_ends_the_run(attempted: Attempted) -> None:
    done, began = attempted(FILES[0], failures=99)
    assert done.decision.action == Action.FAIL and began == 3
    assert "gpu-7" in done.decision.reason and "delete" not in done.decision.reason


def test_a_driver_that_cannot_look_condemns_nothing(
    attempted: Attempted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def away(dataset: Storage, path: str) -> None:
        looked.append(path)
        raise OSError(errno.ETIMEDOUT, "Connection timed out")

    monkeypatch.setattr("cluster.attempt_end.verify_dataset_file", away)
    done, began = attempted(FILES[0])
    assert done.decision.action == Action.FINISH and began == 2 and looked == FILES[:1]
    reason = reason_of(tmp_path, 0)
    assert "the driver could not look, either" in reason and "timed out" in reason and "delete" not in reason
