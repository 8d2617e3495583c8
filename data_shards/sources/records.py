"""Records of a source: its files in batches, each batch's rows in the shape of its file's first row.

``read_records`` is the simple way. To spread the work: ``source_batches`` in one process, ``SourceBatch.records`` in
any.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from data_shards.errors import DataError
from data_shards.sources.batch import Batch, Position
from data_shards.sources.batches import batches, rows
from data_shards.sources.config import ColumnNames, RecordFormat, SourceConfig
from data_shards.sources.files import SourceFile
from data_shards.sources.find import resolve
from data_shards.sources.formats import normaliser, shape_of
from data_shards.sources.record import Record

__all__ = ["Record", "SourceBatch", "SourceCursor", "read_records", "source_batches"]


class SourceCursor(NamedTuple):
    """A place in a source, between two batches: where reading may begin again."""

    file: int = 0
    """index into the source's files"""
    position: Position = Position()
    num_rows: int = 0
    """rows of the source before it"""


@dataclass(frozen=True)
class SourceBatch:
    """A batch, and all that it takes to make records of it. Can be pickled."""

    batch: Batch
    shape: RecordFormat
    source: SourceConfig
    end: SourceCursor
    """where the next batch of the source begins"""

    @property
    def num_rows(self) -> int:
        """That count."""
        return self.batch.num_rows if self.batch.limit is None else self.batch.limit

    def records(self) -> Iterator[Record]:
        """Raises DataError with file and line for a row that is not a record of this shape."""
        return map(normaliser(self.shape, self.source), rows(self.batch))


def source_batches(
    source: SourceConfig, files: Sequence[SourceFile] | None = None, start: SourceCursor | None = None
) -> Iterator[SourceBatch]:
    """The source from ``start`` (some batch's ``end``) on, up to its limit of records.

    Batches without any row are left out. ``files`` are those that ``resolve`` found, where they are known already.

    Raises:
        DataError: a file that can't be read, or a source without any record.
    """
    files = resolve(source) if files is None else files
    start = start or SourceCursor()
    num_rows = start.num_rows
    for index in range(start.file, len(files)):
        position = start.position if index == start.file else Position()
        shape = None if position == Position() else _shape_of_file(files[index], source)
        for batch in batches(files[index], position):
            if source.limit is not None and num_rows >= source.limit:
                return
            if not batch.num_rows:
                continue
            if shape is None:
                shape = _shape_of_batch(batch, source)
            if source.limit is not None and num_rows + batch.num_rows > source.limit:
                batch = replace(batch, limit=source.limit - num_rows)
            num_rows += batch.num_rows
            yield SourceBatch(batch, shape, source, SourceCursor(index, batch.end, num_rows))
    if not num_rows:
        which = "the file holds" if len(files) == 1 else f"its {len(files)} files hold"
        raise DataError(f"{source.path}: {which} no records; each line should be one JSON object, or each row a record")


def _shape_of_batch(batch: Batch, source: SourceConfig) -> RecordFormat:
    return shape_of(next(rows(batch)), source)


def _shape_of_file(file: SourceFile, source: SourceConfig) -> RecordFormat | None:
    return next((_shape_of_batch(batch, source) for batch in batches(file) if batch.num_rows), None)


def read_records(
    source: SourceConfig | str,
    record_format: RecordFormat = RecordFormat.AUTO,
    columns: ColumnNames | None = None,
) -> Iterator[Record]:
    """The records of a source, or of one file or glob by its path, in order.

    Raises:
        DataError: nothing there, nothing in it, or a record that lacks something, with file and line.
    """
    if not isinstance(source, SourceConfig):
        source = SourceConfig(path=source, format=record_format, columns=columns)
    for batch in source_batches(source):
        yield from batch.records()
