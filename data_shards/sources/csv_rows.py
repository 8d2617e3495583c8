"""csv and tsv with a header row: quoted cells may hold line ends, so only parsing tells where a row ends."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import Any

from data_shards.errors import DataError
from data_shards.sources.batch import BATCH_BYTES, MAX_RECORD_BYTES, Batch, Position
from data_shards.sources.files import SourceFile, SourceKind
from data_shards.sources.lines import BOM, blocks, decoded

_DELIMITERS = {SourceKind.CSV: ",", SourceKind.TSV: "\t"}

Line = tuple[int, bytes]


class _Rows:
    """Rows of cells out of numbered lines, and where each begins and ends."""

    def __init__(self, path: str, kind: SourceKind, lines: Iterator[bytes], first_line: int) -> None:
        self._path = path
        self._lines = lines
        self.begins_at = self.next_line = first_line
        self.taken: list[bytes] = []
        """the bytes of the rows since the caller last cleared it"""
        self._row_bytes = 0
        # Of the whole process, so it is only ever raised; Python's own is 128 KiB a cell.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
        self._reader = csv.reader(self._text(), delimiter=_DELIMITERS[kind], strict=True)

    def _text(self) -> Iterator[str]:
        for line in self._lines:
            self._row_bytes += len(line)
            if self._row_bytes > MAX_RECORD_BYTES:
                raise self._error(f"a row of more than {MAX_RECORD_BYTES >> 20} MiB: is a quote never closed?")
            number, self.next_line = self.next_line, self.next_line + 1
            self.taken.append(line)
            yield decoded(self._path, number, line.removeprefix(BOM) if number == 1 else line)

    def _error(self, problem: str) -> DataError:
        return DataError.at(self._path, self.begins_at, problem)

    def __iter__(self) -> Iterator[list[str]]:
        while True:
            self.begins_at, self._row_bytes = self.next_line, 0
            try:
                cells = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise self._error(
                    f"not valid CSV ({error}); the row begins here. A cell with quotes, commas or line ends must stand "
                    'in quotes, and a quote in it be doubled ("")'
                ) from error
            if any(cells):
                yield cells


def _lines(file: SourceFile, start: Position) -> Iterator[bytes]:
    for block in blocks(file, start):
        yield from block.splitlines(keepends=True) if b"\r" not in block else _split_at_newlines(block)


def _split_at_newlines(block: bytes) -> list[bytes]:
    """``splitlines`` would also end a line at a lone carriage return."""
    parts = block.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def _header(file: SourceFile, rows: _Rows) -> tuple[str, ...]:
    """Raises DataError where a name comes twice."""
    header = tuple(next(iter(rows), []))
    twice = sorted({name for name in header if header.count(name) > 1})
    if twice:
        raise DataError.at(file.uri, rows.begins_at, f"the header names {', '.join(map(repr, twice))} more than once")
    return header


def batches(file: SourceFile, start: Position) -> Iterator[Batch]:
    rows = _Rows(file.uri, file.kind, _lines(file, Position()), 1)
    header = _header(file, rows)
    if start.offset:
        rows = _Rows(file.uri, file.kind, _lines(file, start), start.line)
    else:
        start = Position(sum(map(len, rows.taken)), rows.next_line)
        rows.taken.clear()
    size = counted = num_rows = 0
    for _ in rows:
        num_rows += 1
        size += sum(map(len, rows.taken[counted:]))
        counted = len(rows.taken)
        if size >= BATCH_BYTES:
            end = Position(start.offset + size, rows.next_line)
            yield Batch(file.uri, file.kind, b"".join(rows.taken), start, end, num_rows, header)
            rows.taken.clear()
            start, size, counted, num_rows = end, 0, 0, 0
    if num_rows:
        data = b"".join(rows.taken)
        end = Position(start.offset + len(data), rows.next_line)
        yield Batch(file.uri, file.kind, data, start, end, num_rows, header)


def values(batch: Batch) -> Iterator[tuple[int, Any]]:
    rows = _Rows(batch.path, batch.kind, iter(_split_at_newlines(batch.data)), batch.start.line)
    for cells in rows:
        if len(cells) != len(batch.header):
            raise DataError.at(
                batch.path,
                rows.begins_at,
                f"{len(cells)} cells, and the header has {len(batch.header)} ({', '.join(batch.header)[:200]}); a cell "
                "that holds the delimiter must stand in quotes",
            )
        yield rows.begins_at, dict(zip(batch.header, cells, strict=True))
