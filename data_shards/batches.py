"""A source file as batches of rows: cut by one process, parsed by any other.

Reading holds no more than a few batches, however large the file: lines are cut from a stream, tables are read by
their own record batches, a JSON array is scanned in a mapped file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from data_shards import csv_batches, json_array, line_batches, table_batches
from data_shards.errors import DataError
from data_shards.source_batch import Batch, Position, Row
from data_shards.source_files import SourceFile, SourceKind, reading

_CUT: dict[SourceKind, Callable[[SourceFile, Position], Iterator[Batch]]] = {
    SourceKind.JSONL: line_batches.batches,
    SourceKind.TEXT: line_batches.batches,
    SourceKind.JSON: json_array.batches,
    SourceKind.CSV: csv_batches.batches,
    SourceKind.TSV: csv_batches.batches,
    SourceKind.PARQUET: table_batches.batches,
    SourceKind.ARROW: table_batches.batches,
    SourceKind.DATASET: table_batches.batches,
}
_PARSE: dict[SourceKind, Callable[[Batch], Iterator[tuple[int, Any]]]] = {
    SourceKind.JSONL: line_batches.json_values,
    SourceKind.TEXT: line_batches.texts,
    SourceKind.JSON: json_array.values,
    SourceKind.CSV: csv_batches.values,
    SourceKind.TSV: csv_batches.values,
    SourceKind.PARQUET: table_batches.values,
    SourceKind.ARROW: table_batches.values,
    SourceKind.DATASET: table_batches.values,
}


def batches(file: SourceFile, start: Position | None = None) -> Iterator[Batch]:
    """The file from ``start`` on, which is the beginning or some batch's ``end``.

    Begun there, the batches are the same as those that follow when it is read from the beginning. A plain file is
    entered at that place; a compressed one is decompressed up to it.

    Raises:
        DataError: the file can't be read, is not what its name says, or holds a row of more than 256 MiB.
    """
    with reading(file):
        yield from _CUT[file.kind](file, start or Position())


def rows(batch: Batch) -> Iterator[Row]:
    """The rows of a batch, parsed.

    Raises:
        DataError: with file and line, for a row that can't be parsed or is not an object.
    """
    for line, value in islice(_PARSE[batch.kind](batch), batch.limit):
        if not isinstance(value, dict):
            raise DataError.at(batch.path, line, f"a record must be a JSON object, this is {type(value).__name__}")
        yield Row(batch.path, line, value)
