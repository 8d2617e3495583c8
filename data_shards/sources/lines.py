"""Text by whole lines: jsonl, and plain text with one example a line."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data_shards.errors import DataError
from data_shards.sources.batch import BATCH_BYTES, MAX_RECORD_BYTES, Batch, Position
from data_shards.sources.files import SourceFile, open_stream
from data_shards.sources.strict_json import parse_json

BOM = b"\xef\xbb\xbf"


def blocks(file: SourceFile, start: Position) -> Iterator[bytes]:
    """Whole lines from ``start`` on: all that end within ``BATCH_BYTES``, or one longer line.

    Where a block ends depends on nothing before it, and not on how much a single read gives.
    """
    with open_stream(file, start.offset) as stream:
        held = b""
        while True:
            held += _read(stream, BATCH_BYTES - len(held))
            if len(held) < BATCH_BYTES:
                break
            cut = held.rfind(b"\n") + 1
            if not cut:
                held, cut = _first_line(file, stream, held)
            yield held[:cut]
            held = held[cut:]
        if held:
            yield held


def _first_line(file: SourceFile, stream: Any, held: bytes) -> tuple[bytes, int]:
    """``held`` with what follows up to some line's end, and the place behind that end or the file's."""
    parts, size = [held], len(held)
    while chunk := _read(stream, BATCH_BYTES):
        end = chunk.find(b"\n") + 1
        parts.append(chunk)
        if end:
            return b"".join(parts), size + end
        size += len(chunk)
        if size > MAX_RECORD_BYTES:
            raise DataError(f"{file.uri}: a line of more than {MAX_RECORD_BYTES >> 20} MiB; is this a text file?")
    return b"".join(parts), size


def _read(stream: Any, size: int) -> bytes:
    """``size`` bytes, less only at the end: a decompressing stream may give less at a time."""
    if size <= 0:
        return b""
    data = stream.read(size)
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def batches(file: SourceFile, start: Position) -> Iterator[Batch]:
    for data in blocks(file, start):
        pieces = data.split(b"\n")
        end = Position(start.offset + len(data), start.line + len(pieces) - 1)
        num_rows = sum(1 for piece in pieces if piece and not piece.isspace())
        if start.offset == 0 and pieces[0].strip() == BOM:
            num_rows -= 1
        yield Batch(file.uri, file.kind, data, start, end, num_rows)
        start = end


def lines(batch: Batch) -> Iterator[tuple[int, bytes]]:
    """Each line that is not blank, with its number and without its end; the file's byte order mark is left out."""
    data = batch.data.removeprefix(BOM) if batch.start.offset == 0 else batch.data
    for number, line in enumerate(data.split(b"\n"), batch.start.line):
        if line and not line.isspace():
            yield number, line


def json_values(batch: Batch) -> Iterator[tuple[int, Any]]:
    for number, line in lines(batch):
        try:
            yield number, parse_json(line.decode())
        except (ValueError, RecursionError) as error:
            raise DataError.at(
                batch.path, number, f"not valid JSON ({error}); the line begins {line[:60]!r}"
            ) from error


def texts(batch: Batch) -> Iterator[tuple[int, Any]]:
    for number, line in lines(batch):
        yield number, {"text": decoded(batch.path, number, line.removesuffix(b"\r"))}


def decoded(path: str, number: int, line: bytes) -> str:
    """Raises DataError where the line is not UTF-8 text."""
    if b"\0" in line:
        problem = f"a NUL byte at byte {line.index(0)} of the line, as in UTF-16 or a binary file"
    else:
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            problem = f"not UTF-8 ({error})"
    raise DataError.at(path, number, f"{problem}; text must be UTF-8. The line begins {line[:60]!r}")
