"""A piece of a source file: read by one process, parsed by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from data_shards.errors import DataError
from data_shards.sources.files import SourceKind

BATCH_BYTES = 1 << 20
"""About how much a batch holds. Part of what batches are: with another value a window ends elsewhere."""

MAX_RECORD_BYTES = 1 << 28
"""256 MiB: a longer line or cell is a file of another kind, or a quote that is never closed."""


class Position(NamedTuple):
    """A place between two rows of a file, where reading may begin."""

    offset: int = 0
    """bytes of the decompressed text before it; of a table, rows"""
    line: int = 1
    """number of the line, or row, that begins here"""


@dataclass(frozen=True)
class Batch:
    """Whole rows of one file, about ``BATCH_BYTES`` of them, unparsed. Can be pickled.

    Where batches end depends on the content alone, and on nothing before a batch's start.
    """

    path: str
    kind: SourceKind
    data: bytes
    """text as it is in the file; of a table, an Arrow IPC stream"""
    start: Position
    end: Position
    num_rows: int
    header: tuple[str, ...] = ()
    """column names, of csv and tsv"""
    limit: int | None = None
    """only so many of its rows count"""


class Row(NamedTuple):
    """One row, parsed: column to value."""

    path: str
    line: int
    value: dict[str, Any]

    def error(self, problem: str) -> DataError:
        return DataError.at(self.path, self.line, problem)
