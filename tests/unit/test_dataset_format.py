"""docs/dataset-format.md is true: what it says is done here without Baton's code, and compared."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from data_shards.manifest import MANIFEST, VERSION
from data_shards.order.sampler import SAMPLER_VERSION, Sampler
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from tests.support.datasets import random_packs, write_dataset

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "dataset-format.md").read_text(encoding="utf-8")
BLOCK, U64 = 8_388_608, 2**64 - 1


def mix(z: int) -> int:
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & U64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & U64
    return z ^ z >> 31


def keys(seed: int, epoch: int) -> list[int]:
    base = seed * 0x9E3779B97F4A7C15 + (epoch + 1) * 0xD1B54A32D192ED03
    return [mix(mix(base + (i + 1) * 0x9E3779B97F4A7C15 & U64)) for i in range(6)]


def permute(x: int, n: int, seed: int, epoch: int) -> int:
    h = max(1, -(-(n - 1).bit_length() // 2))
    while True:
        left, right = x >> h, x & 2**h - 1
        for key in keys(seed, epoch):
            left, right = right, left ^ mix(right + key & U64) & 2**h - 1
        x = left << h | right
        if x < n:
            return x


def read_as_documented(folder: Path) -> list[tuple[list[int], list[int], list[int], int]]:
    """Every row of ``train``, with its count: by the document, from the bytes."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    claimed = manifest.pop("sha256")
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert hashlib.sha256(canonical).hexdigest() == claimed
    assert (manifest["kind"], manifest["version"]) == ("baton-dataset", VERSION)
    split = manifest["splits"]["train"]
    assert sum(source["rows"] for source in split["sources"]) == split["rows"]

    def table(file: dict[str, Any]) -> pa.Table:
        data = (folder / file["path"]).read_bytes()
        assert len(data) == file["size"]
        blocks = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
        assert [xxhash.xxh3_128_hexdigest(block) for block in blocks] == file["block_hashes"]
        return pa.ipc.open_file(data).read_all()

    counts = table(split["counts"]).column("num_trained").to_pylist()
    rows = []
    for shard in split["shards"]:
        found = table(shard["file"])
        assert found.num_rows == shard["rows"]
        sizes = [len(batch) for batch in found.to_batches()]
        assert set(sizes[:-1]) <= {256} and 1 <= sizes[-1] <= 256
        assert found.column_names == ["input_ids", "trained", "sequence_lengths", "num_trained"]
        rows += [tuple(row.values()) for row in found.to_pylist()]
    assert [row[3] for row in rows] == counts and sum(counts) == split["trained_tokens"]
    return rows


def test_files_are_as_documented(tmp_path: Path) -> None:
    location = Storage.at(tmp_path)
    packs = random_packs(700, 48)
    write_dataset(location, packs, 48, 9000)
    reader = SplitReader(location, read_dataset_manifest(location), "train")
    rows = read_as_documented(tmp_path)
    assert len(rows) == reader.num_rows == 700
    for index, (ids, trained, lengths, count) in enumerate(rows):
        pack = reader.pack(index)
        assert (pack.input_ids.tolist(), pack.sequence_lengths.tolist()) == (ids, lengths)
        assert pack.trained.tolist() == list(map(bool, trained))
        firsts = set(np.cumsum([0, *lengths[:-1]]).tolist())
        assert count == sum(flag for place, flag in enumerate(trained) if place not in firsts)


def test_order_is_as_documented() -> None:
    vectors = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \| ([\d ]+) \|$", DOCUMENT, re.MULTILINE)
    assert len(vectors) == 4
    for *numbers, images in vectors:
        n, seed, epoch = map(int, numbers)
        wanted = list(map(int, images.split()))
        assert [permute(x, n, seed, epoch) for x in range(8)] == wanted
        start = epoch * n
        assert Sampler(n, seed, 8, start + 8).rows_at(start, start + 8).tolist() == wanted
    assert f"`mix(1)` = `{mix(1):#x}`" in DOCUMENT and f"`{keys(0, 0)[0]:#x}`" in DOCUMENT
    steps = [Sampler(10, 3, 4, 25).rows_of_step(step) for step in range(7)]
    assert (
        np.concatenate(steps).tolist() == [permute(p % 10, 10, 3, p // 10) for p in range(25)] and len(steps[-1]) == 1
    )


def test_versions_are_the_documented_ones() -> None:
    assert f"Version {VERSION}. Enough" in DOCUMENT and f'"version": {VERSION},' in DOCUMENT
    assert f"Sampler version {SAMPLER_VERSION}." in DOCUMENT
