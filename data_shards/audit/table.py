"""Which records repeat each other: three hashes and a place for each record, and nothing else.

36 bytes a record; a whole corpus's lie in a file while groups are looked for (``SpooledTable``), which is done in
sixteen parts by the first bits of a hash and takes the memory of one of them. Hashes are 64 bits: among a hundred
million different records, the chance that any two are taken for equal is 1 in 3,700.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np

ROW = np.dtype([("record", "<u8"), ("prompt", "<u8"), ("answer", "<u8"), ("line", "<i8"), ("place", "<i4")])
"""Hashes of the whole record, of everything before its last answer, and of that answer (0: it has none); its line; and
the index of its split and file in ``Table.places``."""

_CHUNK_ROWS = 65_536
_BUCKET_BITS = 4


class Place(NamedTuple):
    split: str
    path: str


class Where(NamedTuple):
    """One record."""

    split: str
    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


class Table(NamedTuple):
    """Rows in the records' order. Chunks are joined while they are small, so that a merge copies little."""

    places: tuple[Place, ...] = ()
    chunks: Iterable[np.ndarray] = ()
    """can be gone through again and again"""

    @property
    def splits(self) -> tuple[str, ...]:
        """In the order in which they came."""
        return tuple(dict.fromkeys(place.split for place in self.places))

    def __len__(self) -> int:
        return sum(map(len, self.chunks))

    def where(self, row: np.void) -> Where:
        place = self.places[row["place"]]
        return Where(place.split, place.path, int(row["line"]))

    def split_numbers(self, rows: np.ndarray) -> np.ndarray:
        """Index of each row's split in ``splits``: int64 ``[n]``."""
        of_place = np.array([self.splits.index(place.split) for place in self.places], np.int64)
        return of_place[rows["place"]]


def join(first: Table, second: Table) -> Table:
    """The rows of ``first``, then those of ``second``."""
    places, moved = _numbered(first.places, second)
    chunks = list(first.chunks)
    for chunk in moved:
        if chunks and len(chunks[-1]) + len(chunk) <= _CHUNK_ROWS:
            chunk = np.concatenate([chunks.pop(), chunk])
        chunks.append(chunk)
    return Table(places, tuple(chunks))


def _numbered(places: tuple[Place, ...], table: Table) -> tuple[tuple[Place, ...], Iterator[np.ndarray]]:
    """These places and the table's, and its rows with its places' numbers among them."""
    number = {place: index for index, place in enumerate(dict.fromkeys((*places, *table.places)))}
    moved = np.array([number[place] for place in table.places], np.int32)
    if np.array_equal(moved, np.arange(len(moved))):
        return tuple(number), iter(table.chunks)
    return tuple(number), (_placed(chunk, moved) for chunk in table.chunks)


def _placed(rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    rows = rows.copy()
    rows["place"] = numbers[rows["place"]]
    return rows


class SpooledTable:
    """A table that grows in a temporary file instead of in memory. As a context manager, it removes the file."""

    def __init__(self) -> None:
        self._places: tuple[Place, ...] = ()
        self._rows = _SpooledRows()

    def __enter__(self) -> SpooledTable:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()

    def add(self, table: Table) -> None:
        """Raises OSError, naming the folder, where there is no room for it."""
        self._places, moved = _numbered(self._places, table)
        for chunk in moved:
            self._rows.append(chunk)

    def whole(self) -> Table:
        """All that was added, while the file is there."""
        return Table(self._places, self._rows)


class _SpooledRows:
    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="baton-audit-")  # noqa: SIM115 - closed by ``close``
        self._size = 0

    def close(self) -> None:
        with suppress(OSError):  # what could not be written was said
            self._file.close()

    def append(self, rows: np.ndarray) -> None:
        try:
            self._size += self._file.write(rows.tobytes())
            self._file.flush()
        except OSError as error:
            needed = f"{error.strerror}: the audit keeps {ROW.itemsize} bytes a record here; point TMPDIR to more room"
            raise OSError(error.errno, needed, tempfile.gettempdir()) from error

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, self._size, _CHUNK_ROWS * ROW.itemsize):
            size = min(_CHUNK_ROWS * ROW.itemsize, self._size - start)
            yield np.frombuffer(os.pread(self._file.fileno(), size, start), ROW)


def groups(table: Table, key: str) -> Iterator[np.ndarray]:
    """Rows that share their ``key`` with another: arrays of ``ROW`` ``[n]`` sorted by it, equal ones in order.

    Each group lies within one of the arrays; keys of 0 are left out.
    """
    shift = np.uint64(64 - _BUCKET_BITS)
    for bucket in range(1 << _BUCKET_BITS):
        parts = [chunk[(chunk[key] >> shift) == bucket] for chunk in table.chunks]
        if not parts:
            return
        rows = np.concatenate(parts)
        values = rows[key]
        order = np.argsort(values, kind="stable")
        values = values[order]
        same = values[1:] == values[:-1]
        member = (np.append(same, False) | np.append(False, same)) & (values != 0)
        if member.any():
            yield rows[order[member]]


def group_starts(*columns: np.ndarray) -> np.ndarray:
    """For sorted columns ``[n]``, the index at which each row's group of equal values begins: int64 ``[n]``."""
    begins = np.ones(len(columns[0]), bool)
    begins[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return np.flatnonzero(begins)[np.cumsum(begins) - 1]


class _Group(NamedTuple):
    """Rows that share a key, earlier splits first. All fields ``[n]``."""

    rows: np.ndarray
    splits: np.ndarray
    first: np.ndarray
    """index of the first row with the same key"""
    first_in_split: np.ndarray
    """index of the first row with the same key and split"""


def _groups_by_split(table: Table, key: str) -> Iterator[_Group]:
    for rows in groups(table, key):
        rows = rows[np.lexsort((table.split_numbers(rows), rows[key]))]
        splits = table.split_numbers(rows)
        yield _Group(rows, splits, group_starts(rows[key]), group_starts(rows[key], splits))


class Repeats(NamedTuple):
    """How many records of each split are of one kind, and some of them: (the record, the one that it goes with)."""

    counts: dict[str, int]
    examples: tuple[tuple[Where, Where], ...]


def _collect(table: Table, found: Iterable[tuple[np.ndarray, np.ndarray]], num_examples: int) -> Repeats:
    """``found``: pairs of arrays of ``ROW`` ``[n]``, the records and what each goes with."""
    counts = np.zeros(len(table.splits), np.int64)
    examples: list[tuple[Where, Where]] = []
    for rows, others in found:
        counts += np.bincount(table.split_numbers(rows), minlength=len(counts))
        for index in range(min(len(rows), num_examples - len(examples))):
            examples.append((table.where(rows[index]), table.where(others[index])))
    named = {split: int(count) for split, count in zip(table.splits, counts, strict=True) if count}
    return Repeats(named, tuple(examples))


def duplicates(table: Table, num_examples: int) -> Repeats:
    """Records that repeat an earlier one of their own split, each with the first of its kind there."""
    found = (
        (group.rows[again], group.rows[group.first_in_split[again]])
        for group in _groups_by_split(table, "record")
        for again in [np.flatnonzero(group.first_in_split != np.arange(len(group.rows)))]
    )
    return _collect(table, found, num_examples)


def leaks(table: Table, num_examples: int) -> Repeats:
    """Records that are in an earlier split too, each with the first of its kind there."""
    found = (
        (group.rows[late], group.rows[group.first[late]])
        for group in _groups_by_split(table, "record")
        for late in [np.flatnonzero(group.splits > group.splits[group.first])]
    )
    return _collect(table, found, num_examples)


def prompt_leaks(table: Table, num_examples: int) -> Repeats:
    """Records whose prompt is in an earlier split, and that differ from the first one that has it there."""
    found = (
        (rows[late], rows[first[late]])
        for rows, splits, first, _ in _groups_by_split(table, "prompt")
        for late in [np.flatnonzero((splits > splits[first]) & (rows["record"] != rows["record"][first]))]
    )
    return _collect(table, found, num_examples)


def conflicts(table: Table, num_examples: int) -> Repeats:
    """Records whose answer differs from the first one that their split gives to the same prompt."""
    found = (
        (rows[other], rows[first[other]])
        for rows, _, _, first in _groups_by_split(table, "prompt")
        for other in [np.flatnonzero(rows["answer"] != rows["answer"][first])]
    )
    return _collect(table, found, num_examples)


def repeated_answers(table: Table, more_than: float, num_examples: int) -> tuple[Repeats, tuple[int, ...]]:
    """Records whose answer is that of more than ``more_than`` records, and how many give each of the examples'.

    The examples are the most frequent answers: their first record, twice.
    """
    counts = np.zeros(len(table.splits), np.int64)
    frequent: list[tuple[int, int, Where]] = []
    for rows in groups(table, "answer"):
        first = group_starts(rows["answer"])
        size = np.bincount(first, minlength=len(rows))
        counts += np.bincount(table.split_numbers(rows[size[first] > more_than]), minlength=len(counts))
        for start in np.flatnonzero(size > more_than):
            frequent.append((-int(size[start]), int(rows["answer"][start]), table.where(rows[start])))
    chosen = sorted(frequent)[:num_examples]
    named = {split: int(count) for split, count in zip(table.splits, counts, strict=True) if count}
    return Repeats(named, tuple((where, where) for *_, where in chosen)), tuple(-count for count, *_ in chosen)
