"""Real records: GSM8K, where the machine has it (``BATON_SHARED`` names the folder that holds ``data/gsm8k``)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_shards.config import DataConfig
from data_shards.encode import Encoder, load_tokenizer, stop_tokens
from data_shards.prepare import TRAIN, VALIDATION, prepare
from data_shards.shard_reader import SplitReader
from data_shards.storage import Storage
from launch.quickstart_inputs import make_base


def test_gsm8k_is_packed_whole(tmp_path: Path) -> None:
    shared = os.environ.get("BATON_SHARED")
    if shared is None:
        pytest.skip("BATON_SHARED is not set, so there is no GSM8K here")
    folder = Path(shared) / "data" / "gsm8k"
    config = DataConfig(train=str(folder / "train.jsonl"), validation=str(folder / "test.jsonl"), seq_len=2048)
    base = tmp_path / "base"
    make_base(base, (folder / "test.jsonl").read_text().splitlines())
    tokenizer = load_tokenizer(base)
    encoder = Encoder(tokenizer, config, stop_tokens(tokenizer, base))
    prepared = prepare(config, encoder, Storage.at(tmp_path / "prepared"))
    train, test = prepared.manifest.splits[TRAIN], prepared.manifest.splits[VALIDATION]
    assert (train.records, test.records) == (7473, 1319)
    assert train.dropped == test.dropped == {}
    assert train.tokens / train.rows / config.seq_len > 0.99
    reader = SplitReader(prepared.location, prepared.manifest, TRAIN)
    eos = tokenizer.eos_token_id
    for row in range(0, reader.num_rows, 97):
        pack = reader.pack(row)
        trained_stops = ((pack.input_ids == eos) & pack.trained.astype(bool)).sum()
        assert trained_stops == len(pack.sequence_lengths), "each record's answer ends with a stop token that is learnt"
