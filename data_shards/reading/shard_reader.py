"""Random access to the packs of a prepared split, straight from mapped Arrow files."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from data_shards.errors import CorruptFile, DatasetCorrupt
from data_shards.hashed_file import FileEntry
from data_shards.manifest import MANIFEST, DatasetManifest, ShardEntry
from data_shards.pack import Pack
from data_shards.reading.prefetch import Prefetcher
from data_shards.reading.shard_cache import ShardCache
from data_shards.reading.shard_file import Batch, ShardFile, map_file
from data_shards.storage import Storage
from data_shards.verified_reader import verify_file
from data_shards.writing.row_counts import read_counts
from data_shards.writing.shard_writer import ROWS_PER_BATCH

log = logging.getLogger(__name__)

_RETRY_PAUSES_S = (0.1, 0.4)
_PREFETCH_THREADS = 4
"""Downloads at once."""


def read_dataset_manifest(dataset: Storage) -> DatasetManifest:
    """Raises FileNotFoundError where nothing was prepared, CorruptFile where the manifest is not whole."""
    return DatasetManifest.from_bytes(dataset.read(MANIFEST), dataset.uri_of(MANIFEST))


def verify_dataset_file(dataset: Storage, path: str) -> None:
    """Read a shard, or the counts of a split, from where it is kept.

    Raises CorruptFile or FileNotFoundError where it, or the manifest, is not as it should be; another OSError where
    that can't be told.
    """
    files = (file for split in read_dataset_manifest(dataset).splits.values() for file in split.files)
    entry = next((file for file in files if file.path == path), None)
    if entry is None:
        raise CorruptFile(f"{dataset.uri_of(path)}: the manifest beside it lists no such file")
    verify_file(dataset, entry)


class SplitReader:
    """One split of a prepared dataset. Opening it checks the sizes of its shards; what is in them is verified against
    the manifest's hashes where it is first touched.

    A dataset that is not on this machine is read through ``cache``, by default the node's own.

    Raises:
        DatasetCorrupt: naming the file that is missing, cut off or changed and stays so when it is read again from
            where it is kept.
        OSError: the storage does not answer.
    """

    def __init__(
        self, dataset: Storage, manifest: DatasetManifest, split: str, cache: ShardCache | None = None
    ) -> None:
        entry = manifest.splits[split]
        self._dataset = dataset
        self._shards = entry.shards
        self._cache = cache if cache or dataset.local_path else ShardCache.default()
        self._first_row = list(accumulate((shard.rows for shard in entry.shards), initial=0))
        self._files: list[ShardFile | None] = [None] * len(entry.shards)
        self._misread: set[int] = set()
        """shards that were not as they should be, at least once"""
        self._locks = [threading.Lock() for _ in entry.shards]
        self._ahead = Prefetcher(self._read_ahead, _PREFETCH_THREADS)
        self.num_rows = entry.rows
        self.seconds_waited = 0.0
        """that callers of ``pack`` spent on shards that were not ready"""
        self._check_sizes()
        with self._naming(entry.counts):
            self._counts = read_counts(dataset, entry.counts)
        found = (self._first_row[-1], len(self._counts), int(self._counts.sum(dtype=np.int64)))
        if found != (entry.rows, entry.rows, entry.trained_tokens):
            raise CorruptFile(f"{dataset.uri}: the shards of split {split!r} do not add up to what the manifest says")

    def _check_sizes(self) -> None:
        folders = {str(PurePosixPath(shard.file.path).parent).removeprefix(".") for shard in self._shards}
        sizes = {
            str(PurePosixPath(folder) / name): size
            for folder in folders
            for name, size in self._dataset.sizes(folder).items()
        }
        for shard in self._shards:
            with self._naming(shard.file):
                shard.file.check_size(sizes.get(shard.file.path), self._dataset.uri_of(shard.file.path))

    @contextmanager
    def _naming(self, file: FileEntry) -> Iterator[None]:
        """Raises DatasetCorrupt for a CorruptFile that is about this file."""
        try:
            yield
        except CorruptFile as error:
            raise DatasetCorrupt(self._dataset.uri, file.path, str(error)) from error

    def pack(self, row: int) -> Pack:
        """The pack with this id, as views of the mapped file."""
        return self.packs(np.array([row]))[0]

    def packs(self, rows: np.ndarray) -> list[Pack]:
        """The packs with these ids, int64 ``[n]``, in this order. Raises IndexError."""
        self._ahead.check()
        found: list[Pack] = []
        first_row, files = self._first_row, self._files
        # _place, _ready and Batch.pack, written out: this is the path of every row, and three calls are half its time.
        for row in rows.tolist():
            if not 0 <= row < self.num_rows:
                raise IndexError(f"row {row} of a split of {self.num_rows}")
            shard = bisect_right(first_row, row) - 1
            number, index = divmod(row - first_row[shard], ROWS_PER_BATCH)
            file = files[shard]
            batch = (file and file.batches[number]) or self._wait_for(shard, number)
            offsets, ids, trained, sequence_offsets, lengths, _ = batch
            start, stop = offsets[index], offsets[index + 1]
            found.append(
                Pack(
                    ids[start:stop],
                    trained[start:stop],
                    lengths[sequence_offsets[index] : sequence_offsets[index + 1]],
                )
            )
        return found

    def num_trained(self, rows: np.ndarray) -> int:
        """Trained tokens in these rows together."""
        return int(self._counts[rows].sum(dtype=np.int64))

    def largest_token_id(self) -> int:
        """Over the whole split, so all of it is read; -1 where it holds nothing."""
        places = [
            (shard, batch)
            for shard, entry in enumerate(self._shards)
            for batch in range(-(-entry.rows // ROWS_PER_BATCH))
        ]
        return max((int(self._wait_for(*place).input_ids.max()) for place in places), default=-1)

    def prefetch(self, rows: Iterable[int]) -> None:
        """Have the packs of these rows fetched and verified in the background, in this order.

        Call it some steps ahead; rows that are ready cost next to nothing. Raises what stopped the background, if
        anything did.
        """
        places = dict.fromkeys(self._place(int(row))[:2] for row in rows)
        if self._cache is not None:
            for shard in {shard for shard, _ in places}:
                self._cache.touch(self._shards[shard].file)  # so that making room spares what is needed next
        self._ahead.add(place for place in places if self._ready(*place) is None)

    def _place(self, row: int) -> tuple[int, int, int]:
        """Shard, record batch in it, row in that."""
        shard = bisect_right(self._first_row, row) - 1
        return shard, *divmod(row - self._first_row[shard], ROWS_PER_BATCH)

    def _ready(self, shard: int, batch: int) -> Batch | None:
        file = self._files[shard]
        return None if file is None else file.batches[batch]

    def _wait_for(self, shard: int, batch: int) -> Batch:
        started = time.perf_counter()
        self._ahead.check()
        try:
            return self._load(shard, batch)
        finally:
            self.seconds_waited += time.perf_counter() - started

    def _read_ahead(self, place: tuple[int, int]) -> None:
        self._load(*place)

    def _load(self, shard: int, batch: int) -> Batch:
        """A record batch, fetched and verified; a shard that is not as it should be is fetched again."""
        for pause in _RETRY_PAUSES_S:
            try:
                return self._load_once(shard, batch)
            except CorruptFile as error:
                log.warning("%s; trying again", str(error))  # not the error itself: its frames keep the file mapped
            time.sleep(pause)
        with self._naming(self._shards[shard].file):
            return self._load_once(shard, batch)

    def _load_once(self, shard: int, batch: int) -> Batch:
        with self._locks[shard]:
            try:
                file = self._files[shard]
                if file is None:
                    file = self._files[shard] = self._open(shard)
                return file.load(batch)
            except CorruptFile:
                self._files[shard] = None
                self._misread.add(shard)
                if self._cache is not None:
                    self._cache.drop(self._shards[shard].file)
                raise

    def _open(self, index: int) -> ShardFile:
        """A shard that was misread is read anew from where it is kept: mapped again, it would be the same pages of this
        machine's memory. Of a remote one the copy was dropped."""
        shard = self._shards[index]
        where = self._dataset.uri_of(shard.file.path)
        if self._cache is None:
            if index in self._misread:
                verify_file(self._dataset, shard.file)
            return ShardFile(self._map_local(shard, where), shard, where)
        self._release_evicted()
        return ShardFile(self._cache.open(self._dataset, shard.file), shard, where)

    def _map_local(self, shard: ShardEntry, where: str) -> pa.Buffer:
        assert self._dataset.local_path is not None
        try:
            return map_file(self._dataset.local_path / shard.file.path)
        except FileNotFoundError:
            shard.file.check_size(None, where)
            raise

    def _release_evicted(self) -> None:
        """Let go of shards whose file was evicted: only then does their disk space come free."""
        assert self._cache is not None
        for index, file in enumerate(self._files):
            if file is not None and not self._cache.holds(self._shards[index].file):
                self._files[index] = None
