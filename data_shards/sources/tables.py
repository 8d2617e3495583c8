"""Tables by record batches: parquet, Arrow IPC, and Hugging Face datasets by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_shards.errors import DataError
from data_shards.sources.batch import BATCH_BYTES, Batch, Position
from data_shards.sources.files import SourceFile, SourceKind, open_random

_MOST_ROWS = 4096
_ARROW_FILE = b"ARROW1"
_DATASET_METADATA = b"huggingface"


def batches(file: SourceFile, start: Position) -> Iterator[Batch]:
    blocks = {SourceKind.PARQUET: _parquet, SourceKind.ARROW: _arrow, SourceKind.DATASET: _dataset}[file.kind]
    first = 0
    for block in blocks(file):
        if first + block.num_rows > start.offset:
            yield from _slices(file, block, first, start.offset)
        first += block.num_rows


def _slices(file: SourceFile, block: pa.RecordBatch, first: int, start: int) -> Iterator[Batch]:
    """A block of rows in pieces of about ``BATCH_BYTES``; those before row ``start`` are left out."""
    step = rows_per_batch(block.nbytes, block.num_rows)
    for offset in range(0, block.num_rows, step):
        if first + offset < start:
            continue
        piece = block.slice(offset, step)
        begin, end = first + offset, first + offset + piece.num_rows
        at, behind = Position(begin, begin + 1), Position(end, end + 1)
        yield Batch(file.uri, file.kind, _to_ipc(piece), at, behind, piece.num_rows)


def rows_per_batch(num_bytes: int, num_rows: int) -> int:
    return max(1, min(_MOST_ROWS, BATCH_BYTES * num_rows // max(1, num_bytes)))


def _to_ipc(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _parquet(file: SourceFile) -> Iterator[pa.RecordBatch]:
    with open_random(file) as raw, pq.ParquetFile(raw, buffer_size=BATCH_BYTES, pre_buffer=False) as parquet:
        for group in range(parquet.num_row_groups):
            size = parquet.metadata.row_group(group)
            step = rows_per_batch(size.total_byte_size, size.num_rows)
            yield from parquet.iter_batches(step, row_groups=[group], use_threads=False)


def _arrow(file: SourceFile) -> Iterator[pa.RecordBatch]:
    with open_random(file) as raw:
        is_file = raw.read(len(_ARROW_FILE)) == _ARROW_FILE
        raw.seek(0)
        if is_file:
            with pa.ipc.open_file(raw) as reader:
                found = (reader.get_batch(index) for index in range(reader.num_record_batches))
                yield from map(_validated, found)
        else:
            with pa.ipc.open_stream(raw) as reader:
                yield from map(_validated, reader)


def _validated(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Offsets of a file that somebody wrote may point anywhere; reading through them would end the process."""
    batch.validate(full=True)
    return batch


def _dataset(file: SourceFile) -> Iterator[pa.RecordBatch]:
    rows = _load_dataset(file)
    schema = rows.features.arrow_schema
    arrow = rows.with_format("arrow")
    for start in range(0, len(arrow), _MOST_ROWS):
        table = arrow[start : start + _MOST_ROWS].replace_schema_metadata(schema.metadata)
        yield from table.combine_chunks().to_batches()


def _load_dataset(file: SourceFile) -> Any:
    import datasets

    name = file.uri.removeprefix("hf://")
    try:
        found = datasets.load_dataset(name, file.hf_config, split=file.hf_split)
    except Exception as error:  # of several libraries, whatever is wrong: name, split, network, login, content
        raise DataError(f"{file.uri}: can't be loaded ({type(error).__name__}: {error})") from error
    if isinstance(found, dict):
        if "train" not in found and len(found) > 1:
            raise DataError(f"{file.uri}: has the splits {', '.join(found)}; set hf_split to one of them")
        found = found["train"] if "train" in found else next(iter(found.values()))
    return found


def values(batch: Batch) -> Iterator[tuple[int, Any]]:
    with pa.ipc.open_stream(batch.data) as reader:
        table = reader.read_all()
    twice = sorted({name for name in table.column_names if table.column_names.count(name) > 1})
    if twice:
        raise DataError(f"{batch.path}: the columns {', '.join(map(repr, twice))} come more than once")
    names = _label_names(table.schema)
    nested = {field.name for field in table.schema if pa.types.is_nested(field.type)}
    for line, value in enumerate(_as_python(batch, table), batch.start.line):
        for column in nested:
            value[column] = _without_nulls(value[column])
        for column, labels in names.items():
            value[column] = _label(value[column], labels)
        yield line, value


def _as_python(batch: Batch, table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as dicts. Raises DataError with the row that holds what Python can't: text that is not UTF-8."""
    try:
        yield from table.to_pylist(maps_as_pydicts="strict")
        return
    except (pa.ArrowException, ValueError, KeyError) as error:
        problem = error
    for index in range(table.num_rows):
        try:
            table.slice(index, 1).to_pylist(maps_as_pydicts="strict")
        except (pa.ArrowException, ValueError, KeyError) as error:
            raise DataError.at(batch.path, batch.start.line + index, f"this row can't be read ({error})") from error
    raise DataError.at(batch.path, batch.start.line, f"this row or a following can't be read ({problem})")


def _without_nulls(value: Any) -> Any:
    """A table gives every turn the same keys, and null to those that it lacks."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _label_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Names of integer labels, by column, where ``datasets`` wrote them into the file."""
    try:
        features = json.loads((schema.metadata or {})[_DATASET_METADATA])["info"]["features"]
        return {
            name: list(feature["names"])
            for name, feature in features.items()
            if feature.get("_type") == "ClassLabel" and name in schema.names
        }
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _label(value: Any, names: list[str]) -> Any:
    known = isinstance(value, int) and 0 <= value < len(names)
    return names[value] if known else None if value == -1 else value
