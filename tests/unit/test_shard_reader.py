"""Rows are read as they were written, lazily, and through a cache that stays small."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from data_shards.errors import CorruptFile, DatasetCorrupt
from data_shards.hashed_file import FileEntry
from data_shards.manifest import DatasetManifest
from data_shards.pack import Sequence
from data_shards.reading import shard_file, shard_reader
from data_shards.reading.shard_cache import ShardCache, cache_name
from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest, verify_dataset_file
from data_shards.storage import Storage
from data_shards.writing.row_counts import read_counts, write_counts
from tests.support.datasets import random_packs, write_dataset
from tests.support.disk import disk_in_a_file, remember_wrongly

SEQ_LEN, ROWS, SHARD_TOKENS = 64, 1500, 11_000


class Remote(pafs.FileSystemHandler):
    """A local folder that is reached like an object store, counts what is read, and fails where it is told to."""

    def __init__(self) -> None:
        self.local = pafs.LocalFileSystem()
        self.opened: list[str] = []
        self.before_open: Callable[[str], None] = lambda path: None

    def open_input_file(self, path: str) -> pa.NativeFile:
        self.opened.append(Path(path).name)
        self.before_open(path)
        return self.local.open_input_file(path)

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        return self.local.get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        return self.local.get_file_info(selector)

    def get_type_name(self) -> str:
        return "remote"

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def _unused(self, *_: Any) -> Any:
        pytest.fail("a reader has no business with this")

    open_input_stream = open_output_stream = open_append_stream = normalize_path = _unused  # type: ignore[assignment]
    copy_file = create_dir = delete_dir = delete_dir_contents = delete_file = move = _unused
    delete_root_dir_contents = _unused


@pytest.fixture(scope="module")
def packs() -> list[list[Sequence]]:
    return random_packs(ROWS, SEQ_LEN)


@pytest.fixture
def manifest(packs: list[list[Sequence]], tmp_path: Path) -> DatasetManifest:
    written = write_dataset(Storage.at(tmp_path / "data"), packs, SEQ_LEN, SHARD_TOKENS)
    assert written == read_dataset_manifest(Storage.at(tmp_path / "data"))
    # Whole batches, and a shorter one behind them: a row's place is not just a division.
    assert written.splits["train"].shards[0].rows > 256
    return written


@pytest.fixture
def remote() -> Remote:
    return Remote()


@pytest.fixture
def far(remote: Remote, tmp_path: Path, manifest: DatasetManifest) -> Storage:
    return Storage("far://data", pafs.PyFileSystem(remote), str(tmp_path / "data"))


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache.at(tmp_path / "cache", 2**30)


def assert_same(reader: SplitReader, packs: list[list[Sequence]], rows: np.ndarray) -> None:
    for row in rows.tolist():
        found, wanted = reader.pack(row), packs[row]
        assert found.trained.dtype == bool and found.input_ids.dtype == np.int32
        np.testing.assert_array_equal(found.input_ids, np.concatenate([s.input_ids for s in wanted]))
        np.testing.assert_array_equal(found.trained, np.concatenate([s.trained for s in wanted]))
        assert found.sequence_lengths.tolist() == [len(s.input_ids) for s in wanted]
        assert reader.num_trained(np.array([row])) == sum(s.num_targets for s in wanted)


def shuffled(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).permutation(ROWS)


def test_rows_are_what_was_written(packs: list[list[Sequence]], manifest: DatasetManifest, tmp_path: Path) -> None:
    reader = SplitReader(Storage.at(tmp_path / "data"), manifest, "train")
    assert_same(reader, packs, shuffled())
    assert reader.num_trained(np.arange(ROWS)) == manifest.splits["train"].trained_tokens
    assert reader.largest_token_id() == max(int(s.input_ids.max()) for pack in packs for s in pack)
    for row in (-1, ROWS):
        with pytest.raises(IndexError):
            reader.pack(row)


def test_a_worker_that_reads_needs_no_pandas(manifest: DatasetManifest, tmp_path: Path) -> None:
    script = (
        "import sys, numpy; from data_shards.storage import Storage; "
        "from data_shards.reading.shard_reader import SplitReader, read_dataset_manifest; "
        "data = Storage.at(sys.argv[1]); reader = SplitReader(data, read_dataset_manifest(data), 'train'); "
        "reader.pack(0); assert reader.num_trained(numpy.arange(3)) > 0; print('pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "data")], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "False\n")


def test_opening_reads_no_shard(manifest: DatasetManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    map_file = shard_file.map_file
    monkeypatch.setattr(shard_reader, "map_file", lambda path: opened.append(path.name) or map_file(path))
    reader = SplitReader(Storage.at(tmp_path / "data"), manifest, "train")
    assert opened == []
    reader.pack(ROWS - 1)
    assert opened == [manifest.splits["train"].shards[-1].file.path]


def test_only_what_is_touched_is_verified(
    packs: list[list[Sequence]], manifest: DatasetManifest, tmp_path: Path
) -> None:
    first, second = (shard.file.path for shard in manifest.splits["train"].shards[:2])
    path = tmp_path / "data" / first
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    reader = SplitReader(Storage.at(tmp_path / "data"), manifest, "train")
    start = manifest.splits["train"].shards[0].rows
    assert_same(reader, packs, np.arange(start, ROWS))
    with pytest.raises(CorruptFile, match=rf"/{first}: block 0 .* does not match its hash.*delete .*/data and run"):
        reader.pack(0)
    assert second != first


def test_a_bad_page_in_memory_is_read_anew_from_the_disk(
    packs: list[list[Sequence]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with disk_in_a_file(tmp_path / "disk", 2**23) as disk:
        data = Storage.at(disk / "data")
        manifest = write_dataset(data, packs, SEQ_LEN, SHARD_TOKENS)
        shard = manifest.splits["train"].shards[0]
        path = disk / "data" / shard.file.path
        good = path.read_bytes()
        remember_wrongly(disk, path, page=3)
        reader = SplitReader(data, manifest, "train")
        assert_same(reader, packs, np.arange(ROWS))
        assert sum(path.name in message and "trying again" in message for message in caplog.messages) == 1
        assert path.read_bytes() == good
        del reader


def test_a_misread_shard_is_let_go_of_and_forgotten_before_it_is_read_again(
    packs: list[list[Sequence]], manifest: DatasetManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system keeps pages that are mapped; and whatever else has the shard in memory is not asked about it."""
    bad: list[weakref.ref[pa.Buffer]] = []
    forgotten: list[bool] = []
    map_file = shard_file.map_file

    def mapped(path: Path) -> pa.Buffer:
        if forgotten:
            return map_file(path)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        buffer = pa.py_buffer(data)
        bad.append(weakref.ref(buffer))
        return buffer

    def forget(descriptor: int, start: int, size: int, advice: int) -> None:
        assert (start, size, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        forgotten.append(all(buffer() is None for buffer in bad))

    monkeypatch.setattr(shard_reader, "map_file", mapped)
    monkeypatch.setattr(os, "posix_fadvise", forget)
    reader = SplitReader(Storage.at(tmp_path / "data"), manifest, "train")
    assert_same(reader, packs, np.arange(5))
    assert len(bad) == 1 and forgotten == [True]


def test_what_is_misread_to_the_end_is_named(
    manifest: DatasetManifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is good: only who reads it from elsewhere can tell."""
    maps, data = [], Storage.at(tmp_path / "data")

    def misread(path: Path) -> pa.Buffer:
        maps.append(path.name)
        return pa.py_buffer(bytes(path.stat().st_size))

    monkeypatch.setattr(shard_reader, "map_file", misread)
    shards = manifest.splits["train"].shards
    reader = SplitReader(data, manifest, "train")
    with pytest.raises(DatasetCorrupt, match=r"block 0 .* does not match its hash.*delete .*/data and run") as raised:
        reader.pack(ROWS - 1)
    assert maps == [shards[-1].file.path] * 3 and raised.value.file == shards[-1].file.path
    again = pickle.loads(pickle.dumps(raised.value))
    assert (str(again), again.file, again.dataset) == (str(raised.value), raised.value.file, data.uri)
    verify_dataset_file(data, raised.value.file)


def test_a_file_of_a_dataset_is_verified_by_its_name(manifest: DatasetManifest, tmp_path: Path) -> None:
    data, split = Storage.at(tmp_path / "data"), manifest.splits["train"]
    for file in split.files:
        verify_dataset_file(data, file.path)
        path = tmp_path / "data" / file.path
        contents = bytearray(path.read_bytes())
        contents[-1] ^= 1
        path.write_bytes(contents)
        with pytest.raises(CorruptFile, match=f"/{file.path}: block 0"):
            verify_dataset_file(data, file.path)
        path.unlink()
        with pytest.raises(CorruptFile, match=f"/{file.path}: missing"):
            verify_dataset_file(data, file.path)
    with pytest.raises(CorruptFile, match="lists no such file"):
        verify_dataset_file(data, "train-99999.arrow")
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError):
        verify_dataset_file(data, split.counts.path)


def test_bad_counts_are_named(manifest: DatasetManifest, tmp_path: Path) -> None:
    path = tmp_path / "data" / manifest.splits["train"].counts.path
    contents = bytearray(path.read_bytes())
    contents[500] ^= 1
    path.write_bytes(contents)
    with pytest.raises(DatasetCorrupt, match=rf"{path.name}: block 0 .*delete .*/data and run") as raised:
        SplitReader(Storage.at(tmp_path / "data"), manifest, "train")
    assert raised.value.file == path.name


def test_missing_and_cut_shards_are_found_at_once(manifest: DatasetManifest, tmp_path: Path) -> None:
    path = tmp_path / "data" / manifest.splits["train"].shards[1].file.path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptFile, match=rf"{path.name}: \d+ bytes, its manifest says"):
        SplitReader(Storage.at(tmp_path / "data"), manifest, "train")
    path.unlink()
    with pytest.raises(CorruptFile, match=f"{path.name}: missing"):
        SplitReader(Storage.at(tmp_path / "data"), manifest, "train")


def test_mapped_rows_outlive_their_file(packs: list[list[Sequence]], far: Storage, cache: ShardCache) -> None:
    reader = SplitReader(far, read_dataset_manifest(far), "train", cache)
    pack = reader.pack(0)
    for path in cache.folder.iterdir():
        if path.is_file():
            path.unlink()
    del reader
    np.testing.assert_array_equal(pack.input_ids, np.concatenate([s.input_ids for s in packs[0]]))


def test_cache_downloads_each_shard_once_for_all_readers(
    packs: list[list[Sequence]], far: Storage, remote: Remote, cache: ShardCache
) -> None:
    remote.before_open = lambda path: time.sleep(0.02)
    readers = [SplitReader(far, read_dataset_manifest(far), "train", cache) for _ in range(4)]
    remote.opened.clear()
    threads = [threading.Thread(target=assert_same, args=(reader, packs, shuffled(1))) for reader in readers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    shards = [shard.file.path for shard in read_dataset_manifest(far).splits["train"].shards]
    assert sorted(name for name in remote.opened if name.startswith("train-0")) == sorted(shards)
    assert all(reader.seconds_waited > 0 for reader in readers)


def test_cache_stays_within_its_bounds(packs: list[list[Sequence]], far: Storage, tmp_path: Path) -> None:
    shards = read_dataset_manifest(far).splits["train"].shards
    limit = sum(sorted(shard.file.size for shard in shards)[-2:])
    assert len(shards) > 2
    cache = ShardCache.at(tmp_path / "small", limit)
    reader = SplitReader(far, read_dataset_manifest(far), "train", cache)
    for row in shuffled().tolist()[:200]:
        reader.pack(row)
        assert sum(path.stat().st_size for path in cache.folder.iterdir() if path.is_file()) <= limit
        mapped = sum(file is not None for file in reader._files)
        assert mapped <= 3  # what was evicted is let go of, or its space would never come free
    assert_same(reader, packs, shuffled(2)[:100])


def test_least_recently_used_goes_first(far: Storage, tmp_path: Path) -> None:
    shards = [shard.file for shard in read_dataset_manifest(far).splits["train"].shards]
    cache = ShardCache.at(tmp_path / "small", 2 * max(entry.size for entry in shards))
    for entry in (shards[0], shards[1]):
        cache.open(far, entry)
        time.sleep(0.02)
    cache.touch(shards[0])
    cache.open(far, shards[2])
    assert [cache.holds(entry) for entry in shards[:3]] == [True, False, True]


def test_damaged_cached_copy_is_fetched_again(
    packs: list[list[Sequence]], far: Storage, remote: Remote, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    SplitReader(far, read_dataset_manifest(far), "train", cache).pack(0)
    entry = read_dataset_manifest(far).splits["train"].shards[0].file
    data = bytearray(cache.path(entry).read_bytes())
    data[100] ^= 1
    cache.path(entry).write_bytes(data)
    remote.opened.clear()
    reader = SplitReader(far, read_dataset_manifest(far), "train", cache)
    assert_same(reader, packs, np.arange(5))
    assert remote.opened.count(entry.path) == 1
    assert any(entry.path in message and "trying again" in message for message in caplog.messages)


def test_shard_that_vanishes_for_a_moment_is_tried_again(
    packs: list[list[Sequence]], far: Storage, cache: ShardCache, tmp_path: Path
) -> None:
    reader = SplitReader(far, read_dataset_manifest(far), "train", cache)
    path = tmp_path / "data" / "train-00000.arrow"
    path.rename(path.with_suffix(".away"))
    threading.Timer(0.05, lambda: path.with_suffix(".away").rename(path)).start()
    assert_same(reader, packs, np.arange(3))


def test_shard_that_stays_away_is_fatal_and_named(far: Storage, cache: ShardCache, tmp_path: Path) -> None:
    reader = SplitReader(far, read_dataset_manifest(far), "train", cache)
    (tmp_path / "data" / "train-00000.arrow").unlink()
    with pytest.raises(CorruptFile, match=r"far://data/train-00000\.arrow: missing"):
        reader.pack(0)


def test_wrong_bytes_in_the_store_never_enter_the_cache(far: Storage, cache: ShardCache, tmp_path: Path) -> None:
    path = tmp_path / "data" / "train-00000.arrow"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reader = SplitReader(far, read_dataset_manifest(far), "train", cache)
    with pytest.raises(CorruptFile, match=r"train-00000\.arrow: block 0"):
        reader.pack(0)
    assert [path for path in cache.folder.iterdir() if path.is_file()] == []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_prefetched_rows_cost_no_waiting(
    packs: list[list[Sequence]], far: Storage, remote: Remote, cache: ShardCache
) -> None:
    reader = SplitReader(far, read_dataset_manifest(far), "train", cache)
    remote.before_open = lambda path: time.sleep(0.05)
    rows = shuffled()[:40]
    reader.prefetch(rows)
    assert reader.seconds_waited == 0
    until(lambda: all(reader._ready(*reader._place(row)[:2]) is not None for row in rows.tolist()))
    assert_same(reader, packs, rows)
    assert reader.seconds_waited == 0
    until(lambda: reader._ahead._running == 0)  # no thread is left behind


@pytest.mark.parametrize("error", [MemoryError("no more"), SystemExit(1)])
def test_death_of_the_background_reaches_the_trainer(
    error: BaseException, far: Storage, remote: Remote, cache: ShardCache
) -> None:
    reader = SplitReader(far, read_dataset_manifest(far), "train", cache)
    reader.pack(ROWS - 1)

    def die(*_: int) -> Any:
        raise error

    reader._load, load = die, reader._load  # type: ignore[method-assign,assignment]
    reader.prefetch([0])
    until(lambda: reader._ahead.failure is not None)
    reader._load = load  # type: ignore[method-assign]
    for row in (0, ROWS - 1):  # the second is ready, but nothing reads ahead any more
        with pytest.raises(RuntimeError, match=f"the thread that reads shards ahead died: {type(error).__name__}"):
            reader.pack(row)
    with pytest.raises(RuntimeError):
        reader.prefetch([1])


def test_corrupt_shard_met_in_the_background_is_named(far: Storage, cache: ShardCache, tmp_path: Path) -> None:
    reader = SplitReader(far, read_dataset_manifest(far), "train", cache)
    (tmp_path / "data" / "train-00001.arrow").unlink()
    reader.prefetch([ROWS - 1, reader._first_row[1]])
    until(lambda: reader._ahead.failure is not None)
    with pytest.raises(CorruptFile, match=r"train-00001\.arrow: missing"):
        reader.pack(0)


def test_abandoned_downloads_make_room(far: Storage, tmp_path: Path) -> None:
    entry = read_dataset_manifest(far).splits["train"].shards[0].file
    cache = ShardCache.at(tmp_path / "small", entry.size + 10)
    abandoned, live = cache.folder / "a.part", cache.folder / "b.part"
    for path in (abandoned, live):
        path.write_bytes(bytes(entry.size))

    os.utime(abandoned, (1, 1))
    cache.open(far, entry)
    assert not abandoned.exists() and live.exists() and cache.holds(entry)


def test_equal_content_has_one_name() -> None:
    hashes, others = b"a" * 16 + b"b" * 16, b"b" * 16 + b"a" * 16
    assert cache_name(FileEntry("x", 5, hashes)) == cache_name(FileEntry("y/z", 5, hashes))
    assert cache_name(FileEntry("x", 5, hashes)) != cache_name(FileEntry("x", 6, hashes))
    assert cache_name(FileEntry("x", 5, hashes)) != cache_name(FileEntry("x", 5, others))


def test_counts_are_read_back_and_verified(tmp_path: Path) -> None:
    storage = Storage.at(tmp_path)
    counts = np.arange(1000, dtype=np.int32) % 77
    entry = write_counts(storage, "train", counts)
    np.testing.assert_array_equal(read_counts(storage, entry), counts)
    empty = write_counts(storage, "empty", [])
    assert read_counts(storage, empty).tolist() == []
    data = bytearray((tmp_path / entry.path).read_bytes())
    data[500] ^= 1
    (tmp_path / entry.path).write_bytes(data)
    with pytest.raises(CorruptFile, match=r"train-counts\.arrow: block 0"):
        read_counts(storage, entry)
