"""Launchers that want one run at once, on a local disk and on S3: never two have it, and always one gets it.

BATON_RACES sets the number of rounds: half a minute a thousand on a disk, ten a thousand on the S3 server, which gets a
twentieth of them.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_shards.storage import Storage
from tests.support.claim_race import ONE_WINS, race, race_processes
from tests.support.object_store import CREDENTIALS, S3Server, create_bucket, s3_uri

ROUNDS = int(os.environ.get("BATON_RACES", "300"))
SETTLE_S, SETTLE_ON_S3_S = 0.002, 0.02
"""A hundredth and less of what launchers take, so that they meet at every point of the way."""


def test_threads_on_a_disk(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    for number in range(ROUNDS):
        assert race(storage, number, SETTLE_S) == ONE_WINS, f"round {number}"


def test_processes_on_a_disk(tmp_path: Path) -> None:
    claimants = 4
    ends = race_processes(str(tmp_path), ROUNDS // 3, claimants, SETTLE_S)
    assert ends == [(1, claimants - 1)] * (ROUNDS // 3)


def test_threads_on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with S3Server(tmp_path / "server.log") as server:
        create_bucket(server.port, "raced")
        storage = Storage.at(s3_uri("raced", "runs", server.port))
        for number in range(ROUNDS // 20):
            assert race(storage, number, SETTLE_ON_S3_S) == ONE_WINS, f"round {number}"
