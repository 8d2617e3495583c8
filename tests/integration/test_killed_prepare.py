"""Preparing that is killed at random moments goes on, and ends in the same bytes, with any number of processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder
from data_shards.manifest import MANIFEST
from data_shards.prepare import prepare
from data_shards.storage import Storage
from tests.support import tokenizers as families

KILLS = {1: 6, 4: 2}
"""By the number of processes: starting four takes most of the time"""
if "BATON_KILLS" in os.environ:  # for a longer look
    KILLS = dict.fromkeys(KILLS, int(os.environ["BATON_KILLS"]))


def words(rng: random.Random, most: int) -> str:
    return " ".join(
        rng.choices(("What", "is", "the", "capital", "of", "France?", "Paris", "11"), k=rng.randint(1, most))
    )


def write_sources(folder: Path) -> list[str]:
    """Two sources, of many small files and of two larger ones; a file is at least one batch, so windows are many."""
    rng = random.Random(5)
    for name, files, count in (("many", 40, 60), ("few", 2, 300)):
        (folder / name).mkdir()
        for number in range(files):
            records = [
                {"question": f"{name} {number} {i} {words(rng, 30)}", "answer": words(rng, 120)} for i in range(count)
            ]
            text = "".join(json.dumps(record) + "\n" for record in (*records, records[0]))
            (folder / name / f"{number}.jsonl").write_text(text)
    return [str(folder / "many"), str(folder / "few")]


def make(sources: list[str], root: str, processes: int) -> None:
    """What the killed process runs."""
    config = DataConfig(
        train=sources,
        validation_fraction=0.1,
        seq_len=256,
        max_shard_tokens=4_000,
        processes=processes,
        cleaning={"deduplicate": True},
    )
    tokenizer = families.chatml()
    prepare(config, Encoder(tokenizer, config, ["<|im_end|>"]), Storage.at(root))


def contents(root: Path) -> dict[str, bytes]:
    """Hidden files too; the lock is empty."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_sources(tmp_path_factory.mktemp("sources"))


def num_shards(root: Path) -> int:
    return len(list(root.glob("*/*-0*.arrow")))


@pytest.fixture(scope="module")
def undisturbed(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("undisturbed")
    make(sources, str(root), 1)
    found = contents(root)
    assert num_shards(root) > 40 and any(path.endswith(MANIFEST) for path in found)
    return found


@pytest.mark.parametrize("processes", KILLS)
def test_killed_at_random_moments(
    sources: list[str], undisturbed: dict[str, bytes], tmp_path: Path, processes: int
) -> None:
    expected = undisturbed
    total = sum(path.endswith(".arrow") for path in expected)
    context = multiprocessing.get_context("forkserver")
    rng = random.Random()
    root = tmp_path / "root"
    fired = partly = 0
    while fired < KILLS[processes]:
        child = context.Process(target=make, args=(sources, str(root), processes))
        child.start()
        until = rng.randint(num_shards(root), total)
        while child.exitcode is None and num_shards(root) < until:
            time.sleep(0.001)
        child.join(rng.uniform(0, 0.2))
        child.kill()
        child.join()
        if child.exitcode == 0:  # it was faster
            assert contents(root) == expected
            shutil.rmtree(root)
            continue
        assert child.exitcode == -signal.SIGKILL
        fired += 1
        partly += bool(list(root.glob("*/windows/*.json")))
    make(sources, str(root), 1)
    print(f"{processes} processes: {fired} kills, {partly} of them left finished parts behind")
    assert partly > 0
    assert contents(root) == expected
