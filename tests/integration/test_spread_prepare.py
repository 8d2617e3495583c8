"""Preparing spread over a Ray cluster gives the bytes of a local one, goes on from receipts, and names bad lines."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.ray_prepare import write_tasks_on_ray
from cluster.ray_train import connected
from data_shards.config import DataConfig
from data_shards.encode import Encoder
from data_shards.errors import BadInput, DataError
from data_shards.prepare import prepare
from data_shards.storage import Storage
from tests.integration.test_killed_prepare import contents, write_sources
from tests.support import tokenizers as families


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    with connected():
        yield


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


def test_same_bytes_as_locally(ray_cluster: None, tmp_path: Path) -> None:
    write_sources(tmp_path)
    config = config_of(tmp_path)
    prepare(config, encoder_of(config), Storage.at(tmp_path / "local"))
    lines: list[str] = []
    prepare(config, encoder_of(config), Storage.at(tmp_path / "spread"), write=write_tasks_on_ray, report=lines.append)
    assert contents(tmp_path / "spread") == contents(tmp_path / "local")
    assert any("7 of 7 tasks done" in line for line in lines), lines


def test_bad_line_is_named_and_what_was_done_is_kept(ray_cluster: None, tmp_path: Path) -> None:
    write_sources(tmp_path)
    config = config_of(tmp_path)
    bad = Path(config.train[3].path)
    good = bad.read_text()
    first, second, *rest = good.splitlines()
    bad.write_text("\n".join([first, second.replace('"answer"', '"anwser"'), *rest]))
    root = tmp_path / "root"
    with pytest.raises(DataError, match=rf"{bad}:2: 'answer' is missing"):
        prepare(config, encoder_of(config), Storage.at(root), write=write_tasks_on_ray)
    bad.write_text(good)
    prepare(config, encoder_of(config), Storage.at(root), write=write_tasks_on_ray)
    prepare(config, encoder_of(config), Storage.at(tmp_path / "local"))
    (folder,) = (path.parent for path in root.glob("*/manifest.json"))
    (local,) = (path.parent for path in (tmp_path / "local").glob("*/manifest.json"))
    assert contents(folder) == contents(local)


def test_ray_leaves_our_warnings_alone(ray_cluster: None) -> None:
    assert logging.getLogger("data_shards.shard_reader").isEnabledFor(logging.WARNING)


def test_deduplication_is_refused(ray_cluster: None, tmp_path: Path) -> None:
    write_sources(tmp_path)
    config = config_of(tmp_path, cleaning={"deduplicate": True})
    with pytest.raises(BadInput, match=r"data\.cleaning\.deduplicate needs all records in one place"):
        prepare(config, encoder_of(config), Storage.at(tmp_path / "root"), write=write_tasks_on_ray)
