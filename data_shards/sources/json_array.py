"""JSON files: an array of records, an object whose "data" is one, or lines of JSON under the wrong name.

The array is scanned for where its elements end, in a mapped file, and parsed by whoever gets the batch. The scan need
not be exact about what is wrong: a piece that it cut wrongly does not parse.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
from collections.abc import Iterator
from typing import IO, Any

from data_shards.errors import DataError
from data_shards.sources import lines
from data_shards.sources.batch import BATCH_BYTES, MAX_RECORD_BYTES, Batch, Position
from data_shards.sources.files import SourceFile, SourceKind, open_local
from data_shards.sources.strict_json import DECODER

_SPACE = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*+")
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[\[\]{}]', re.DOTALL)
_SCALAR = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[^\s,\]\[{}"]++', re.DOTALL)
_KEY = re.compile(rb'("(?:[^"\\]++|\\.)*+")[ \t\r\n]*+:[ \t\r\n]*+', re.DOTALL)
_BETWEEN = re.compile(r"[ \t\r\n]*+,?[ \t\r\n]*+")
_DATA = b'"data"'
Bytes = Any
"""bytes, or a mapped file"""


def batches(file: SourceFile, start: Position) -> Iterator[Batch]:
    with open_local(file) as local:
        if os.fstat(local.fileno()).st_size:
            yield from _batches(file, local, start)


def _batches(file: SourceFile, local: IO[bytes], start: Position) -> Iterator[Batch]:
    with mmap.mmap(local.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = find_array(data)
        if begin is not None:
            yield from _array_batches(file, data, begin, start)
            return
    yield from lines.batches(dataclasses.replace(file, kind=SourceKind.JSONL), start)


def find_array(data: Bytes) -> int | None:
    """Where the array's first element may begin: of the whole, or of "data" in an object; None where there is none."""
    place = _after_space(data, 0)
    if data[place : place + 1] == b"[":
        return place + 1
    if data[place : place + 1] != b"{":
        return None
    place = _after_space(data, place + 1)
    while key := _KEY.match(data, place):
        place = key.end()
        if key[1] == _DATA and data[place : place + 1] == b"[":
            return place + 1
        end = _end_of_value(data, place)
        if end is None:
            return None
        place = _after_space(data, end)
        if data[place : place + 1] != b",":
            return None
        place = _after_space(data, place + 1)
    return None


def _after_space(data: Bytes, place: int) -> int:
    found = _SPACE.match(data, place)
    return found.end() if found else place


def _end_of_value(data: Bytes, place: int) -> int | None:
    """Behind the value that begins here; None where it does not end."""
    if data[place : place + 1] not in (b"{", b"["):
        scalar = _SCALAR.match(data, place)
        return scalar.end() if scalar else None
    depth = 0
    for token in _TOKEN.finditer(data, place):
        first = token[0][:1] if token.end() - token.start() == 1 else b'"'
        depth += (first in b"[{") - (first in b"]}")
        if depth == 0:
            return token.end()
        if token.end() - place > MAX_RECORD_BYTES:
            return None
    return None


def _array_batches(file: SourceFile, data: Bytes, begin: int, start: Position) -> Iterator[Batch]:
    """``start`` is before the first element, or behind some element."""
    resumed = start.offset > 0
    place, line = (start.offset, start.line) if resumed else (begin, 1 + _count_lines(data, 0, begin))
    num_rows = 0
    first, behind = Position(place, line), Position(place, line)
    while True:
        element = _next_element(file, data, behind, is_first=not resumed and num_rows == 0 and behind.offset == begin)
        if element is None:
            break
        if num_rows == 0:
            first = element
        end = _end_of_value(data, element.offset)
        if end is None:
            raise DataError.at(
                file.uri,
                element.line,
                f"not valid JSON: no value that ends begins here ({_glimpse(data, element.offset)})",
            )
        behind = Position(end, element.line + _count_lines(data, element.offset, end))
        num_rows += 1
        if behind.offset - first.offset >= BATCH_BYTES:
            yield Batch(file.uri, file.kind, data[first.offset : behind.offset], first, behind, num_rows)
            num_rows, resumed = 0, True
    if num_rows:
        yield Batch(file.uri, file.kind, data[first.offset : behind.offset], first, behind, num_rows)
    _check_rest(file, data, begin, behind)


def _next_element(file: SourceFile, data: Bytes, behind: Position, *, is_first: bool) -> Position | None:
    """Where the element after ``behind`` begins; None at the array's end."""
    place = _after_space(data, behind.offset)
    mark = data[place : place + 1]
    if mark == b"]":
        return None
    if not is_first:
        if mark != b",":
            line = behind.line + _count_lines(data, behind.offset, place)
            what = _glimpse(data, place) if mark else "the file ends"
            raise DataError.at(file.uri, line, f"not valid JSON: expected , or ] of the array of records, found {what}")
        place = _after_space(data, place + 1)
    return Position(place, behind.line + _count_lines(data, behind.offset, place))


def _check_rest(file: SourceFile, data: Bytes, begin: int, behind: Position) -> None:
    """What is around the elements must be JSON too: a file that was cut off, or has something behind it, is refused."""
    end = _after_space(data, behind.offset)
    if begin + len(data) - end > MAX_RECORD_BYTES:
        raise DataError(f"{file.uri}: more than {MAX_RECORD_BYTES >> 20} MiB beside the array of records")
    rest = (data[:begin] + data[end:]).removeprefix(lines.BOM)
    try:
        DECODER.decode(rest.decode())
    except (ValueError, RecursionError) as error:
        in_head = _count_lines(data, 0, begin)
        found = getattr(error, "lineno", in_head + 1)
        line = behind.line + _count_lines(data, behind.offset, end) + found - in_head - 1
        line = found if found <= in_head else line
        raise DataError.at(file.uri, line, f"not valid JSON around the array of records ({error})") from error


def _glimpse(data: Bytes, place: int) -> str:
    return repr(bytes(data[place : place + 40]))


def _count_lines(data: Bytes, start: int, stop: int) -> int:
    return bytes(data[start:stop]).count(b"\n")


def values(batch: Batch) -> Iterator[tuple[int, Any]]:
    try:
        text = batch.data.decode()
    except UnicodeDecodeError as error:
        line = batch.start.line + batch.data.count(b"\n", 0, error.start)
        raise DataError.at(batch.path, line, f"not valid JSON ({error})") from error
    place, line = 0, batch.start.line
    while place < len(text):
        try:
            value, end = DECODER.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError.at(
                batch.path, line, f"not valid JSON ({error}); the record begins {text[place : place + 60]!r}"
            ) from error
        yield line, value
        between = _BETWEEN.match(text, end)
        following = between.end() if between else end
        line += text.count("\n", place, following)
        place = following
