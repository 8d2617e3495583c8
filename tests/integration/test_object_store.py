"""A real S3 server behind a proxy that fails as networks do: the same bytes arrive."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_shards.config import DataConfig
from data_shards.encoding.encoder import Encoder
from data_shards.errors import CorruptFile
from data_shards.order.sampler import Sampler
from data_shards.prepare import Prepared, prepare, write_tasks
from data_shards.reading.shard_cache import ShardCache
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest
from data_shards.storage import Storage
from launch import finetune
from launch.quickstart_inputs import records, write_jsonl
from tests.integration.conftest import Workshop
from tests.support.checkpoints import masters_of, random_values, trained_shapes, write_checkpoint
from tests.support.command import RunFiles, run_here, write_config
from tests.support.datasets import random_packs, write_dataset
from tests.support.fault_proxy import FaultProxy
from tests.support.object_store import CREDENTIALS, S3Server, create_bucket, s3_uri
from tests.support.tiny import save_tiny_model
from tests.support.tokenizers import chatml, stop_texts
from trainer import export_writer
from trainer.config import ModelConfig
from trainer.export import ExportSource, export_full

BUCKET = "baton"
SEQ_LEN, ROWS, SHARD_TOKENS = 256, 600, 2_500


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with S3Server(tmp_path_factory.mktemp("s3") / "server.log") as running:
        create_bucket(running.port, BUCKET)
        yield running.port


@pytest.fixture
def proxy(server: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    with FaultProxy(server) as running:
        yield running


def bytes_of(location: Storage) -> dict[str, bytes]:
    return {name: location.read(name) for name in location.list()}


def test_preparing_to_a_failing_store_gives_the_same_bytes(
    proxy: FaultProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "train.jsonl", records(200, seed=1))
    config = DataConfig(train=str(tmp_path / "train.jsonl"), seq_len=384, max_shard_tokens=4000)
    tokenizer = chatml()
    encoder = Encoder(tokenizer, config, stop_texts(tokenizer))
    local = prepare(config, encoder, Storage.at(tmp_path / "local"))
    proxy.faults.share_503, proxy.faults.share_cut, proxy.faults.latency_s = 0.1, 0.05, 0.005
    with caplog.at_level(logging.WARNING):
        far = prepare(config, encoder, Storage.at(s3_uri(BUCKET, "prepared", proxy.port)))
        assert bytes_of(far.location) == bytes_of(local.location)
    assert proxy.faults.seen["503"] > 0
    assert far.manifest == local.manifest and len(local.manifest.splits["train"].shards) > 2
    assert far.location.uri.startswith(f"s3://{BUCKET}/prepared/{local.manifest.fingerprint}?")
    assert Storage.at(far.location.uri).list() == local.location.list()  # as a worker opens what it is told
    lines: list[str] = []
    prepare(config, encoder, Storage.at(s3_uri(BUCKET, "prepared", proxy.port)), report=lines.append)
    assert any("already prepared" in line for line in lines)


def test_bounded_writing_sends_one_part_at_a_time(proxy: FaultProxy) -> None:
    """What is not sent yet is held; a writer that runs ahead would come to hold the whole file."""
    location, parts = Storage.at(s3_uri(BUCKET, "bounded", proxy.port)), [bytes([value]) * 2**23 for value in range(5)]
    proxy.faults.latency_s = 0.2
    at_once = []
    for storage in (location, location.bounded()):
        proxy.faults.seen.clear()
        storage.write("file", (part for part in parts))
        at_once.append(proxy.faults.seen["at once"])
        assert location.read("file") == b"".join(parts)
    assert at_once[0] > 1 and at_once[1] == 1


def test_export_to_a_failing_store_goes_on_and_gives_the_same_bytes(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_tiny_model(tmp_path / "base")
    checkpoints = Storage.at(tmp_path / "checkpoints")
    ref = write_checkpoint(checkpoints, masters_of(trained_shapes(base), 3), random_values())
    source = ExportSource(checkpoints, ref, base, ModelConfig(base=str(base)))
    local, far = Storage.at(tmp_path / "local"), Storage.at(s3_uri(BUCKET, "exported/model", proxy.port))
    export_full(source, local, torch.bfloat16, max_file_bytes=16_000)
    write_parts, ended = export_writer.write_parts, []

    def ends_at_the_third(target: Storage, path: str, *rest: Any) -> Any:
        if path.startswith("model-00003-"):
            ended.append(path)
            raise KeyboardInterrupt
        return write_parts(target, path, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(export_writer, "write_parts", ends_at_the_third)
        export_full(source, far, torch.bfloat16, max_file_bytes=16_000)
    lines: list[str] = []
    proxy.faults.share_503 = 0.05
    proxy.faults.die_for(1)
    export_full(source, far, torch.bfloat16, max_file_bytes=16_000, report=lines.append)
    assert ended and ": 2 of " in lines[0] and not far.uri.endswith("model"), lines
    assert bytes_of(far) == bytes_of(local) and "config.json" in far.list()
    assert proxy.faults.seen["503"] > 0 and proxy.faults.seen["dead"] > 0


def test_another_job_finishes_the_same_dataset_first(proxy: FaultProxy, tmp_path: Path) -> None:
    """A store has no lock: the other removes the receipts, and what it made is found."""
    write_jsonl(tmp_path / "train.jsonl", records(40, seed=2))
    config = DataConfig(train=str(tmp_path / "train.jsonl"), seq_len=384, processes=1)
    tokenizer = chatml()
    encoder = Encoder(tokenizer, config, stop_texts(tokenizer))
    root = Storage.at(s3_uri(BUCKET, "raced", proxy.port))
    first: list[Prepared] = []

    def overtaken(*task: Any) -> None:
        write_tasks(*task)
        first.append(prepare(config, encoder, root))

    found = prepare(config, encoder, root, write=overtaken)
    assert found.manifest == first[0].manifest and not found.location.list("windows")

    def vanishing(*task: Any) -> None:
        write_tasks(*task)
        task[3].delete_tree("windows")

    other = Storage.at(s3_uri(BUCKET, "vanished", proxy.port))
    with pytest.raises(FileNotFoundError):
        prepare(config, encoder, other, write=vanishing)


def test_reading_from_a_store_that_fails_is_slow_and_dies(proxy: FaultProxy, tmp_path: Path) -> None:
    packs = random_packs(ROWS, SEQ_LEN)
    manifest = write_dataset(Storage.at(s3_uri(BUCKET, "reading", proxy.port)), packs, SEQ_LEN, SHARD_TOKENS)
    shards = len(manifest.splits["train"].shards)
    assert shards > 25
    proxy.faults.share_503, proxy.faults.share_cut, proxy.faults.latency_s = 0.1, 0.1, 0.02
    location = Storage.at(s3_uri(BUCKET, "reading", proxy.port))
    reader = SplitReader(location, read_dataset_manifest(location), "train", ShardCache.at(tmp_path / "cache", 2**30))
    sampler = Sampler(ROWS, seed=5, global_batch=32, total_rows=ROWS)
    seen = []
    for step in range(sampler.num_steps):
        if step == 0:
            proxy.faults.die_for(5)
        reader.prefetch(sampler.rows_at(step * 32, min((step + 2) * 32, ROWS)))
        for row in sampler.rows_of_step(step).tolist():
            found = reader.pack(row)
            np.testing.assert_array_equal(found.input_ids, np.concatenate([s.input_ids for s in packs[row]]))
            np.testing.assert_array_equal(found.trained, np.concatenate([s.trained for s in packs[row]]))
            seen.append(row)
    assert sorted(seen) == list(range(ROWS))
    faults = proxy.faults.seen
    assert faults["503"] > 0 and faults["cut"] > 0 and faults["dead"] > 0, faults


def test_the_step_waits_for_nothing_while_the_network_keeps_up(proxy: FaultProxy, tmp_path: Path) -> None:
    packs = random_packs(ROWS, SEQ_LEN)
    location = Storage.at(s3_uri(BUCKET, "ahead", proxy.port))
    manifest = write_dataset(location, packs, SEQ_LEN, SHARD_TOKENS)
    proxy.faults.latency_s = 0.05
    reader = SplitReader(location, manifest, "train", ShardCache.at(tmp_path / "cache", 2**30))
    sampler = Sampler(ROWS, seed=5, global_batch=8, total_rows=ROWS)
    reader.prefetch(sampler.rows_at(0, 64))
    deadline = time.monotonic() + 30
    while reader._ahead._running and time.monotonic() < deadline:
        time.sleep(0.05)
    for step in range(12):
        reader.prefetch(sampler.rows_at((step + 1) * 8, (step + 9) * 8))
        time.sleep(0.15)  # the model
        for row in sampler.rows_of_step(step).tolist():
            reader.pack(row)
    assert reader.seconds_waited < 0.05


def test_writing_begins_again_only_where_it_can(proxy: FaultProxy) -> None:
    location = Storage.at(s3_uri(BUCKET, "writing", proxy.port))
    data = [bytes([value]) * 100_000 for value in range(3)]
    proxy.faults.die_for(3)
    entry = location.write("list", data)  # a list can be gone through again
    assert proxy.faults.seen["dead"] > 0
    assert location.read("list") == b"".join(data) and entry.size == 300_000
    proxy.faults.share_503 = 1.0
    with pytest.raises(OSError, match="503"):
        location.write("generator", (chunk for chunk in data))
    proxy.faults.share_503 = 0.0
    assert location.size("generator") is None


def test_what_is_not_there_is_not_tried_again(proxy: FaultProxy) -> None:
    location = Storage.at(s3_uri(BUCKET, "nothing", proxy.port))
    started = time.monotonic()
    with pytest.raises(FileNotFoundError):
        location.read("file")
    assert location.size("file") is None and location.list() == [] and location.sizes() == {}
    with pytest.raises(OSError, match=r"(?i)bucket"):
        Storage.at(s3_uri("no-such-bucket", "x", proxy.port)).write("file", [b"x"])
    assert time.monotonic() - started < 5


def test_shard_deleted_from_the_store_is_named(proxy: FaultProxy, tmp_path: Path) -> None:
    location = Storage.at(s3_uri(BUCKET, "deleted", proxy.port))
    manifest = write_dataset(location, random_packs(100, 64), 64, 2000)
    reader = SplitReader(location, manifest, "train", ShardCache.at(tmp_path / "cache", 2**30))
    location.delete_file("train-00000.arrow")
    with pytest.raises(CorruptFile, match=rf"s3://{BUCKET}/deleted/train-00000\.arrow\?.*: missing"):
        reader.pack(0)
    with pytest.raises(CorruptFile, match=r"train-00000\.arrow.*: missing"):
        SplitReader(location, manifest, "train", ShardCache.at(tmp_path / "cache", 2**30))


def test_workers_of_a_node_share_the_downloads(proxy: FaultProxy, tmp_path: Path) -> None:
    location = Storage.at(s3_uri(BUCKET, "shared", proxy.port))
    packs = random_packs(300, SEQ_LEN)
    manifest = write_dataset(location, packs, SEQ_LEN, SHARD_TOKENS)
    proxy.faults.latency_s = 0.02
    cache = ShardCache.at(tmp_path / "cache", 2**30)
    readers = [SplitReader(location, manifest, "train", cache) for _ in range(3)]
    proxy.faults.seen.clear()

    def read_all(reader: SplitReader) -> None:
        for row in range(300):
            reader.pack(row)

    threads = [threading.Thread(target=read_all, args=(reader,)) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    shards = len(manifest.splits["train"].shards)
    # Each download asks for size, size again on opening, and one block.
    assert proxy.faults.seen["requests"] <= 3 * shards


def test_training_from_a_failing_store_equals_training_from_disk(
    proxy: FaultProxy, workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATON_CACHE_DIR", str(tmp_path / "cache"))
    values = workshop.values | {"run": {"storage": str(tmp_path / "runs")}}
    values["training"] = values["training"] | {"steps": 8}
    values["data"] = values["data"] | {"max_shard_tokens": 3_000}
    traces = []
    for name, prepared in (("disk", str(tmp_path / "prepared")), ("store", s3_uri(BUCKET, "training", proxy.port))):
        values["data"] = values["data"] | {"prepared": prepared}
        proxy.faults.share_503, proxy.faults.latency_s = 0.1, 0.01
        done = run_here(finetune.main, "--config", str(write_config(tmp_path, values, name)))
        assert done.code == 0, done.output
        traces.append(RunFiles(tmp_path / "runs" / name).trace())
    assert traces[0] == traces[1]
    assert proxy.faults.seen["503"] > 0 and len(list((tmp_path / "cache").rglob("*"))) > 6
