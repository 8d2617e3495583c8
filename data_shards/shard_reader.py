"""Random access to the packs of a prepared split, straight from mapped Arrow files."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from data_shards.errors import CorruptFile
from data_shards.manifest import MANIFEST, DatasetManifest, ShardEntry
from data_shards.pack import Pack
from data_shards.shard_writer import ROWS_PER_BATCH, SCHEMA
from data_shards.storage import Storage, VerifiedReader


def read_dataset_manifest(dataset: Storage) -> DatasetManifest:
    """Raises FileNotFoundError where nothing was prepared, CorruptFile where the manifest is not whole."""
    return DatasetManifest.from_bytes(dataset.read(MANIFEST), f"{dataset.uri}/{MANIFEST}")


class SplitReader:
    """One split of a prepared dataset; verified against the manifest's hashes when it is opened.

    Raises CorruptFile, naming the shard, where a file is missing, cut off or changed.
    """

    def __init__(self, dataset: Storage, manifest: DatasetManifest, split: str) -> None:
        entry = manifest.splits[split]
        try:
            self._batches = [_open_shard(dataset, shard) for shard in entry.shards]
        except CorruptFile as error:
            raise CorruptFile(
                f"{error}. To prepare the dataset anew, delete {dataset.uri} and run the same command again"
            ) from error
        self._first_row = np.cumsum([0, *(shard.rows for shard in entry.shards)])
        self.num_rows = entry.rows
        counts = [batch.column("num_trained").to_numpy() for shard in self._batches for batch in shard]
        self._num_trained = np.concatenate([np.zeros(0, np.int32), *counts])
        if self._first_row[-1] != entry.rows or int(self._num_trained.sum()) != entry.trained_tokens:
            raise CorruptFile(f"{dataset.uri}: the shards of split {split!r} do not add up to what the manifest says")

    def pack(self, row: int) -> Pack:
        """The pack with this id, as views of the mapped file."""
        shard = int(np.searchsorted(self._first_row, row, side="right")) - 1
        batch, index = divmod(row - int(self._first_row[shard]), ROWS_PER_BATCH)
        columns = self._batches[shard][batch]
        return Pack(*(_list_item(columns.column(i), index) for i in range(3)))

    def largest_token_id(self) -> int:
        """Over the whole split; -1 where it holds nothing."""
        ids = [batch.column("input_ids").values.to_numpy() for shard in self._batches for batch in shard]
        return max((int(part.max()) for part in ids if part.size), default=-1)

    def num_trained(self, rows: np.ndarray) -> int:
        """Trained tokens in these rows together."""
        return int(self._num_trained[rows].sum())


def _list_item(column: pa.ListArray, index: int) -> np.ndarray:
    start, stop = column.offsets[index].as_py(), column.offsets[index + 1].as_py()
    return column.values.slice(start, stop - start).to_numpy(zero_copy_only=True)


def _open_shard(dataset: Storage, shard: ShardEntry) -> list[pa.RecordBatch]:
    reader = VerifiedReader(dataset, shard.file)
    reader.verify_all()
    where = f"{dataset.uri}/{shard.file.path}"
    try:
        file = pa.ipc.open_file(dataset.open(shard.file.path))
        batches = [file.get_batch(i) for i in range(file.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        raise CorruptFile(f"{where}: not an Arrow file ({error})") from error
    if not file.schema.equals(SCHEMA) or sum(b.num_rows for b in batches) != shard.rows:
        raise CorruptFile(f"{where}: its columns or its number of rows are not what the manifest says")
    return batches
