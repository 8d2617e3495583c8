"""Random flips of single bytes: caught and named, or without effect. A million of them: tests/support/fuzz_dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_shards.errors import CorruptFile
from data_shards.manifest import MANIFEST, ShardEntry
from data_shards.reading import shard_reader
from data_shards.reading.shard_file import ShardFile, map_file
from data_shards.reading.shard_reader import read_dataset_manifest
from data_shards.storage import Storage
from tests.support.datasets import random_packs, write_dataset
from tests.support.fuzz_dataset import flip_bytes, make_dataset

FLIPS = 2000


@pytest.fixture(autouse=True)
def no_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_reader, "_RETRY_PAUSES_S", ())


def test_no_flip_is_read_wrongly(tmp_path: Path) -> None:
    location = make_dataset(tmp_path)
    outcomes = flip_bytes(location, FLIPS, seed=11)
    assert sum(outcomes.values()) == FLIPS
    # Hashes cover every byte of an Arrow file; only the manifest's white space may change.
    assert {name for name, outcome in outcomes if outcome == "harmless"} <= {MANIFEST}
    caught = {name for name, outcome in outcomes if outcome == "caught"}
    assert caught == set(location.list()) and len(caught) > 3


def test_the_fuzzer_notices_a_reader_that_trusts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    location = make_dataset(tmp_path)
    monkeypatch.setattr("data_shards.hashed_file.FileEntry.check_digest", lambda *_: None)
    with pytest.raises(AssertionError, match=r"other rows were read|the counts are not"):
        flip_bytes(location, 200, seed=1)


def test_a_wrong_footer_of_a_right_hash_is_refused(tmp_path: Path) -> None:
    """What a forger, or another writer's mistake, may bring: the hashes fit, the file does not."""
    location = Storage.at(tmp_path)
    shard = write_dataset(location, random_packs(300, 32), 32, 100_000).splits["train"].shards[0]
    data = map_file(tmp_path / shard.file.path).to_pybytes()
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[len(damaged) - 1 - int(rng.integers(0, 700))] ^= int(rng.integers(1, 256))
        entry = location.write("forged.arrow", [bytes(damaged)])
        try:
            file = ShardFile(map_file(tmp_path / "forged.arrow"), ShardEntry(entry, shard.rows), "forged")
            for batch in range(len(file.batches)):
                file.load(batch)
        except CorruptFile as error:
            refused += str(error).startswith("forged")
    assert refused > 50


def test_manifest_flips_alone(tmp_path: Path) -> None:
    """Each byte of the manifest once."""
    location = make_dataset(tmp_path)
    wanted = read_dataset_manifest(location)
    data = location.read(MANIFEST)
    rng = np.random.default_rng(3)
    harmless = 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / MANIFEST).write_bytes(damaged)
        try:
            assert read_dataset_manifest(location) == wanted, place
            harmless += 1
        except CorruptFile as error:
            assert MANIFEST in str(error)
    assert harmless < len(data) / 10
