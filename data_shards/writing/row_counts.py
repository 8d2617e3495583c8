"""The trained tokens of each row in a small file beside the shards: a step's sum is known without reading its rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from data_shards.as_numpy import as_numpy
from data_shards.errors import CorruptFile
from data_shards.hashed_file import FileEntry
from data_shards.storage import Storage
from data_shards.verified_reader import VerifiedReader

SCHEMA = pa.schema([("num_trained", pa.int32())])


def write_counts(storage: Storage, split: str, counts: np.ndarray | Sequence[int]) -> FileEntry:
    """Write ``<split>-counts.arrow``: one record batch, row i for row i of the split."""
    column = pa.array(np.asarray(counts, np.int32))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([column], schema=SCHEMA))
    return storage.write(f"{split}-counts.arrow", [sink.getvalue()])


def read_counts(storage: Storage, entry: FileEntry) -> np.ndarray:
    """int32 ``[rows]``. Raises CorruptFile, naming the file."""
    where = storage.uri_of(entry.path)
    data = b"".join(VerifiedReader(storage, entry).blocks())
    try:
        table = pa.ipc.open_file(data).read_all()
    except (pa.ArrowException, OSError) as error:
        raise CorruptFile(f"{where}: not an Arrow file ({error})") from error
    if not table.schema.equals(SCHEMA) or table.column(0).null_count:
        raise CorruptFile(f"{where}: is not a column of counts")
    return as_numpy(table.column(0).combine_chunks())
