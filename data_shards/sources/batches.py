"""A source file as batches of rows: cut by one process, parsed by any other.

Reading holds no more than a few batches, however large the file: lines are cut from a stream, tables are read by
their own record batches, a JSON array is scanned in a mapped file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from data_shards.errors import DataError
from data_shards.sources import csv_rows, json_array, lines, tables
from data_shards.sources.batch import Batch, Position, Row
from data_shards.sources.files import SourceFile, SourceKind, reading

_CUT: dict[SourceKind, Callable[[SourceFile, Position], Iterator[Batch]]] = {
    SourceKind.JSONL: lines.batches,
    SourceKind.TEXT: lines.batches,
    SourceKind.JSON: json_array.batches,
    SourceKind.CSV: csv_rows.batches,
    SourceKind.TSV: csv_rows.batches,
    SourceKind.PARQUET: tables.batches,
    SourceKind.ARROW: tables.batches,
    SourceKind.DATASET: tables.batches,
}
_PARSE: dict[SourceKind, Callable[[Batch], Iterator[tuple[int, Any]]]] = {
    SourceKind.JSONL: lines.json_values,
    SourceKind.TEXT: lines.texts,
    SourceKind.JSON: json_array.values,
    SourceKind.CSV: csv_rows.values,
    SourceKind.TSV: csv_rows.values,
    SourceKind.PARQUET: tables.values,
    SourceKind.ARROW: tables.values,
    SourceKind.DATASET: tables.values,
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
