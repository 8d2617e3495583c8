"""Preparing spread over a Ray cluster gives the bytes of a local one, goes on from receipts, and names bad lines."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.ray_prepare import write_tasks_on_ray, write_tasks_where_they_can_be
from cluster.ray_train import connect
from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder
from data_shards.errors import DataError
from data_shards.manifest import MANIFEST
from data_shards.prepare import WriteTasks, prepare
from data_shards.storage import Storage
from tests.integration.test_killed_prepare import contents, write_sources
from tests.support import tokenizers as families
from tests.support.distributed import process_of_its_own

Driver = Callable[..., Any]


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with process_of_its_own(_connect) as call:
        yield call


def _connect() -> None:
    connect(os.cpu_count() or 1)
    Finalize(None, ray.shutdown, exitpriority=1)  # of the process; atexit is not heeded in one like this


def config_of(folder: Path, **options: object) -> DataConfig:
    # A task is a group of files up to 64 MiB; as sources of their own these small ones are a task each.
    files = sorted(map(str, (folder / "many").glob("*.jsonl")))[:6]
    return DataConfig(
        train=[{"path": path, "name": path} for path in files],
        validation=str(folder / "few"),
        seq_len=256,
        max_shard_tokens=4_000,
        processes=1,
        **options,
    )


def encoder_of(config: DataConfig) -> Encoder:
    return Encoder(families.chatml(), config, ["<|im_end|>"])


def spread(config: DataConfig, root: Path, write: WriteTasks = write_tasks_on_ray) -> list[str]:
    """In the driver. Returns what was reported."""
    lines: list[str] = []
    prepare(config, encoder_of(config), Storage.at(root), write=write, report=lines.append)
    return lines


def locally(config: DataConfig, root: Path) -> dict[str, bytes]:
    prepare(config, encoder_of(config), Storage.at(root))
    return contents(root)


@pytest.mark.parametrize(
    ("deduplicate", "write", "tasks"),
    [(False, write_tasks_on_ray, 7), (True, write_tasks_on_ray, 1), (False, write_tasks_where_they_can_be, 7)],
    ids=["as was wished", "repeated records are found by one task", "where all nodes see everything"],
)
def test_same_bytes_as_locally(
    driver: Driver, tmp_path: Path, deduplicate: bool, write: WriteTasks, tasks: int
) -> None:
    write_sources(tmp_path)
    config = config_of(tmp_path, cleaning={"deduplicate": deduplicate})
    lines = driver(spread, config, tmp_path / "spread", write)
    assert contents(tmp_path / "spread") == locally(config, tmp_path / "local")
    assert any(f"{tasks} of {tasks} tasks done" in line for line in lines), lines


def test_bad_line_is_named_and_what_was_done_is_kept(driver: Driver, tmp_path: Path) -> None:
    write_sources(tmp_path)
    config = config_of(tmp_path)
    bad = Path(config.train[3].path)
    good = bad.read_text()
    first, second, *rest = good.splitlines()
    bad.write_text("\n".join([first, second.replace('"answer"', '"anwser"'), *rest]))
    root = tmp_path / "root"
    with pytest.raises(DataError, match=rf"{bad}:2: 'answer' is missing"):
        driver(spread, config, root)
    bad.write_text(good)
    driver(spread, config, root)
    local = locally(config, tmp_path / "local")
    (manifest,) = (path for path in local if path.endswith(MANIFEST))
    dataset = manifest.removesuffix(MANIFEST)
    assert {path: data for path, data in contents(root).items() if path.startswith(dataset)} == {
        path: data for path, data in local.items() if path.startswith(dataset)
    }


def warns() -> bool:
    return logging.getLogger("data_shards.reading.shard_reader").isEnabledFor(logging.WARNING)


def test_ray_leaves_our_warnings_alone(driver: Driver) -> None:
    assert driver(ray.is_initialized) and driver(warns)
