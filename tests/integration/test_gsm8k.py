"""Real records: GSM8K, where the machine has it (``BATON_SHARED`` names the folder that holds ``data/gsm8k``)."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder, load_tokenizer, stop_tokens
from data_shards.prepare import TRAIN, VALIDATION, Prepared, prepare
from data_shards.reading.shard_reader import SplitReader
from data_shards.storage import Storage
from launch.quickstart_inputs import make_base
from tests.support.data_files import write_rows


@pytest.fixture(scope="module")
def folder() -> Path:
    shared = os.environ.get("BATON_SHARED")
    if shared is None:
        pytest.skip("BATON_SHARED is not set, so there is no GSM8K here")
    return Path(shared) / "data" / "gsm8k"


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    make_base(base, (folder / "test.jsonl").read_text().splitlines())
    return base


def prepared_from(base: Path, root: Path, **sources: str) -> Prepared:
    config = DataConfig(**sources, seq_len=2048)
    tokenizer = load_tokenizer(base)
    return prepare(config, Encoder(tokenizer, config, stop_tokens(tokenizer, base)), Storage.at(root))


@pytest.fixture(scope="module")
def prepared(folder: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    sources = {"train": str(folder / "train.jsonl"), "validation": str(folder / "test.jsonl")}
    return prepared_from(base, tmp_path_factory.mktemp("prepared"), **sources)


def test_gsm8k_is_packed_whole(prepared: Prepared, base: Path) -> None:
    train, test = prepared.manifest.splits[TRAIN], prepared.manifest.splits[VALIDATION]
    assert (train.records, test.records) == (7473, 1319)
    assert train.dropped == test.dropped == {}
    assert train.tokens / train.rows / prepared.manifest.seq_len > 0.99
    reader = SplitReader(prepared.location, prepared.manifest, TRAIN)
    eos = load_tokenizer(base).eos_token_id
    for row in range(0, reader.num_rows, 97):
        pack = reader.pack(row)
        trained_stops = ((pack.input_ids == eos) & pack.trained.astype(bool)).sum()
        assert trained_stops == len(pack.sequence_lengths), "each record's answer ends with a stop token that is learnt"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_same_packs_from_every_kind_of_file(
    kind: str, folder: Path, base: Path, prepared: Prepared, tmp_path: Path
) -> None:
    lines = (folder / "train.jsonl").read_text().splitlines()
    path = write_rows(tmp_path / f"train.{kind}", [json.loads(line) for line in lines])
    found = prepared_from(base, tmp_path / "prepared", train=path).manifest.splits[TRAIN]
    assert found.shards == prepared.manifest.splits[TRAIN].shards, "the same bytes, by their hashes"
