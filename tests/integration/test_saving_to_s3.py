"""An S3 server in trouble while a checkpoint is saved: training goes on, nothing torn is accepted, nothing is lost."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from data_shards.retry import Patience
from tests.support.checkpoints import committed
from tests.support.distributed import run_workers
from tests.support.fault_proxy import Fault, FaultProxy, Faults
from tests.support.object_store import CREDENTIALS, S3Server, create_bucket, s3_uri
from tests.support.saving_loop import (
    STEPS,
    Looped,
    Setting,
    committed_steps,
    last_files,
    looped,
    recorded_steps,
)
from tests.support.tiny import save_tiny_model
from trainer import checkpoint
from trainer.loop import Outcome
from trainer.rank_file import RankFile
from trainer.run_directory import RunDirectory

BUCKET = "baton"
CLIENT_GIVES_UP_S = 6.0
"""Arrow's S3 client tries by itself for so long; only then does Baton's patience begin."""
SHORT = Patience(total_s=1)
"""Spent when the client gives up for the second time."""
ENOUGH_S = CLIENT_GIVES_UP_S / 2
"""That each of the steps behind a save waits for it, so that one that is not tried again has ended when the next is
due."""
PART_OF_RANK_1 = "/rank-00001.safetensors?partNumber="


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3") / "server.log") as running:
        create_bucket(running.port, BUCKET)
        yield running


@dataclass(frozen=True)
class Store:
    """A folder on a server, seen directly and through a proxy that fails."""

    server: S3Server
    proxy: FaultProxy
    folder: str

    @property
    def faults(self) -> Faults:
        return self.proxy.faults

    @property
    def uri(self) -> str:
        return s3_uri(BUCKET, self.folder, self.server.port)

    @property
    def uri_through_proxy(self) -> str:
        return s3_uri(BUCKET, self.folder, self.proxy.port)


@pytest.fixture
def store(server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with FaultProxy(server.port) as proxy:
        yield Store(server, proxy, tmp_path.name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def undisturbed(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[RankFile, ...]:
    """The files of the last checkpoint, with their hashes."""
    root = tmp_path_factory.mktemp("undisturbed")
    run_workers(looped, 2, base, str(root), Setting())
    return last_files(root)


def looped_there(base: str, root: str, setting: Setting) -> Looped:
    os.environ.update(CREDENTIALS)  # the process that this one was forked from may be older than the test
    return looped(base, root, setting)


def looped_on(store: Store, base: str, setting: Setting) -> Looped:
    """How it was for rank 0: finished, as for all ranks."""
    results = run_workers(looped_there, 2, base, store.uri_through_proxy, setting)
    assert [result.outcome for result in results] == [Outcome.FINISHED] * 2
    return results[0]


def check_nothing_is_lost(store: Store, undisturbed: tuple[RankFile, ...]) -> None:
    """As it lies on the server: every step is recorded, and what was committed is whole."""
    assert recorded_steps(store.uri) == list(range(1, STEPS + 1))
    checkpoints = RunDirectory.at(store.uri).checkpoints
    for ref in committed(checkpoints):
        checkpoint.verify(checkpoints, ref.name)
    assert last_files(store.uri) == undisturbed


def test_an_overloaded_server_is_asked_again(store: Store, base: str, undisturbed: tuple[RankFile, ...]) -> None:
    """Longer than the client itself has patience."""
    began: list[float] = []

    def busy_with_step_8(request: str) -> Fault | None:
        if "00000008-a1" not in request:
            return None
        began.append(time.monotonic())
        return Fault.BUSY if began[-1] < began[0] + CLIENT_GIVES_UP_S + 1 else None

    store.faults.pick = busy_with_step_8
    done = looped_on(store, base, Setting(patience=Patience(total_s=30), wait_s=ENOUGH_S))
    assert store.faults.seen["503"] > 20 and {9, 10} <= set(done.steps_behind)
    assert committed_steps(store.uri) == list(range(4, 25, 4)) and done.warned == []
    check_nothing_is_lost(store, undisturbed)


def test_an_upload_that_is_cut_off_costs_at_most_its_own_save(
    store: Store, base: str, undisturbed: tuple[RankFile, ...]
) -> None:
    """Twice while step 8 is saved, which the client bears, and again and again while step 16 is."""
    cuts = {8: 0, 16: 0}

    def cut(request: str) -> Fault | None:
        for step, most in ((8, 2), (16, math.inf)):
            if f"{step:08d}-a1{PART_OF_RANK_1}" in request and cuts[step] < most:
                cuts[step] += 1
                return Fault.CUT_UPLOAD
        return None

    store.faults.pick = cut
    done = looped_on(store, base, Setting(patience=SHORT, wait_s=ENOUGH_S))
    assert cuts[8] == 2 and cuts[16] > 2 and store.faults.seen[Fault.CUT_UPLOAD] == sum(cuts.values())
    assert {17, 18} <= set(done.steps_behind)
    found = committed_steps(store.uri)  # the upload is begun a second time, so step 20 may be due before it has failed
    assert found[:3] == [4, 8, 12] and 16 not in found and found[-1] == STEPS
    assert len(done.warned) == 1 and "the save of step 16 failed" in done.warned[0]
    check_nothing_is_lost(store, undisturbed)


def test_a_save_that_is_due_while_a_slow_one_is_written_is_left_out(
    store: Store, base: str, undisturbed: tuple[RankFile, ...]
) -> None:
    store.faults.latency_s = 0.08
    done = looped_on(store, base, Setting(wait_s=0))
    assert set(range(5, 10)) <= set(done.steps_behind), "the save of step 4 must have been slow"
    left_out = "the save of step 4 is still being written, so step 8 is not saved"
    assert any(left_out in line for line in done.said) and done.warned == []
    found = committed_steps(store.uri)
    assert found[0] == 4 and found[-1] == STEPS and 8 not in found
    check_nothing_is_lost(store, undisturbed)


def test_a_server_that_dies_costs_the_save_under_way_and_no_other(
    store: Store, base: str, undisturbed: tuple[RankFile, ...], tmp_path: Path
) -> None:
    """Killed while rank 1 sends its part of step 8; what it had stored is there when it comes back."""
    kept, killed = tmp_path / "kept", threading.Event()

    def kill_while_step_8_is_sent(request: str) -> None:
        if f"00000008-a1{PART_OF_RANK_1}" in request and not killed.is_set():
            pafs.copy_files(store.uri, str(kept))
            store.server.kill()
            store.faults.dead_until = math.inf
            killed.set()

    def come_back() -> None:
        assert killed.wait(60)
        dead_until = time.monotonic() + 2 * CLIENT_GIVES_UP_S + 3  # each upload is begun a second time
        store.server.start()
        create_bucket(store.server.port, BUCKET)
        pafs.copy_files(str(kept), store.uri)
        store.faults.dead_until = dead_until

    store.faults.pick = kill_while_step_8_is_sent
    coming_back = threading.Thread(target=come_back)
    coming_back.start()
    done = looped_on(store, base, Setting(patience=SHORT, wait_s=ENOUGH_S))
    coming_back.join()
    assert killed.is_set() and store.faults.seen["dead"] > 20 and {9, 10} <= set(done.steps_behind)
    found = committed_steps(store.uri)
    assert found[0] == 4 and 8 not in found and found[-1] == STEPS and len(found) >= 3
    assert len(done.warned) == 1 and "the save of step 8 failed" in done.warned[0]
    check_nothing_is_lost(store, undisturbed)
