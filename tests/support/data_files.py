"""Rows as data files of every kind, written by the libraries that people write them with."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Rows = Sequence[dict[str, Any]]


def _csv(rows: Rows, delimiter: str) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()} for row in rows
    )
    return text.getvalue().encode()


def _parquet(rows: Rows) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink, row_group_size=1000)
    return sink.getvalue()


def _arrow(rows: Rows) -> bytes:
    """As ``datasets`` writes it: the streaming format."""
    sink = io.BytesIO()
    table = pa.Table.from_pylist(list(rows))
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return sink.getvalue()


def bytes_of(kind: str, rows: Rows) -> bytes:
    """A file of this kind (its extension). A cell of csv and tsv that is no text holds JSON."""
    if kind in ("csv", "tsv"):
        return _csv(rows, {"csv": ",", "tsv": "\t"}[kind])
    if kind == "json":
        return json.dumps(list(rows), indent=1, ensure_ascii=False).encode()
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    return {"parquet": _parquet, "arrow": _arrow}[kind](rows)


def write_rows(path: Path, rows: Rows) -> str:
    """By the extension, compressed where it ends with .gz or .zst."""
    *_, kind = path.name.removesuffix(".gz").removesuffix(".zst").split(".")
    write_bytes(path, bytes_of(kind, rows))
    return str(path)


def write_bytes(path: Path, data: bytes) -> str:
    """Compressed where the name says so."""
    if path.suffix == ".gz":
        data = gzip.compress(data, 1)
    elif path.suffix == ".zst":
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return str(path)
