"""Files of every kind give the same records; batches end where the content says; what can't be read is named."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_shards.errors import DataError
from data_shards.sources import lines
from data_shards.sources.batch import BATCH_BYTES, Batch, Row
from data_shards.sources.batches import batches, rows
from data_shards.sources.config import SourceConfig, parse_source
from data_shards.sources.files import SourceFile
from data_shards.sources.find import content_identity, resolve
from data_shards.sources.records import Record, SourceCursor, read_records, source_batches
from tests.support.data_files import bytes_of, write_bytes, write_rows

TEXT_KINDS = ("jsonl", "json", "csv", "tsv")
KINDS = (*TEXT_KINDS, "parquet", "arrow")
SUFFIXES = ("", ".gz", ".zst")


def numbered(count: int, size: int = 10) -> list[dict[str, Any]]:
    """Records with all that makes trouble in a cell, of about ``size`` characters."""
    filler = 'a "b", c\n\té🎉 ' * (size // 15)
    return [{"question": f"{number}: {filler}", "answer": f'"{number}"'} for number in range(count)]


def file_of(path: str) -> SourceFile:
    (file,) = resolve(SourceConfig(path=path))
    return file


def all_rows(found: Iterable[Batch]) -> list[Row]:
    return [row for batch in found for row in rows(batch)]


def contents(records: Iterable[Record]) -> list[tuple[Any, ...]]:
    return [(record.messages, record.text, record.tools) for record in records]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_the_same_records(kind: str, suffix: str, tmp_path: Path) -> None:
    wanted = numbered(300)
    path = write_rows(tmp_path / f"data.{kind}{suffix}", wanted)
    found = list(read_records(path))
    assert [[turn["content"] for turn in record.messages] for record in found] == [
        [row["question"], row["answer"]] for row in wanted
    ]
    assert {record.path for record in found} == {path} and {record.source for record in found} == {"data"}


TALK = {
    "messages": [
        {"role": "user", "content": "Sum?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "1", "tool_call_id": "7"},
        {"role": "assistant", "content": "One.", "weight": 0},
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
}
ROWS_OF_FORMATS: dict[str, list[dict[str, Any]]] = {
    "messages": [TALK, {"messages": [{"role": "assistant", "content": "Hm."}], "tools": []}],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "No."}], "system": "S"}
    ],
    "instruction": [{"instruction": "Do", "input": "", "output": "Done", "history": [["a", "b"]], "system": "S"}],
    "prompt and completion": [{"prompt": "Hm?", "completion": " No."}],
    "prompt and completion in turns": [
        {"prompt": [{"role": "user", "content": "Hm?"}], "completion": [{"role": "assistant", "content": "No."}]}
    ],
    "columns": [{"question": "Hm?", "answer": "No."}],
    "classification": [{"text": "Fine.", "label": 3}],
    "text": [{"text": "  Fine.\nVery."}],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ROWS_OF_FORMATS)
def test_every_format_from_every_kind(name: str, kind: str, tmp_path: Path) -> None:
    """A table gives all turns the same keys and a csv file holds JSON in its cells: the records are the same."""
    given_rows = ROWS_OF_FORMATS[name]
    wanted = read_records(write_rows(tmp_path / "wanted.jsonl", given_rows))
    found = read_records(write_rows(tmp_path / f"data.{kind}", given_rows))
    assert contents(found) == contents(wanted)


@pytest.mark.parametrize("kind", ("csv", "json", "parquet"))
def test_gsm8k_is_the_same_from_every_kind(kind: str, tmp_path: Path) -> None:
    shared = os.environ.get("BATON_SHARED")
    if shared is None:
        pytest.skip("BATON_SHARED is not set, so there is no GSM8K here")
    source = Path(shared) / "data" / "gsm8k" / "train.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines()
    path = write_rows(tmp_path / f"train.{kind}", [json.loads(line) for line in lines])
    wanted, found = list(read_records(str(source))), list(read_records(path))
    assert len(found) == 7473 and contents(found) == contents(wanted)
    assert [record.digest() for record in found] == [record.digest() for record in wanted]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    cases = {
        "a.csv": (b'\xef\xbb\xbfquestion,answer\r\n"two\r\nlines",x\r\n\r\n,\r\nlast,"y"', [2, 6]),
        "a.tsv": (b"question\tanswer\na\tb\nc\td\n", [2, 3]),
        "a.json": (b'[\n {"text": "a"},\n\n {"text":\n "b"}, {"text": "c"}]\n', [2, 4, 5]),
        "b.json": (b'{"version": {"a": "]"}, "data": [{"text": "a"},\n{"text": "b"}\n], "more": 1}', [1, 2]),
        "c.json": (b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}', [1, 3]),
        "a.txt": (b"\xef\xbb\xbf\n one \r\n\n\ntwo\rstill two", [2, 5]),
    }
    for name, (data, numbers) in cases.items():
        path = write_bytes(tmp_path / name, data)
        assert [record.line for record in read_records(path)] == numbers, name
    texts = [record.text for record in read_records(str(tmp_path / "a.txt"))]
    assert texts == [" one ", "two\rstill two"]
    first = next(read_records(str(tmp_path / "a.csv")))
    assert first.messages[0]["content"] == "two\r\nlines"


def test_rows_of_tables_are_counted_from_one(tmp_path: Path) -> None:
    for kind in ("parquet", "arrow"):
        path = write_rows(tmp_path / f"data.{kind}", numbered(2500))
        assert [record.line for record in read_records(path)] == list(range(1, 2501))


@pytest.mark.parametrize("suffix", ("", ".gz"))
@pytest.mark.parametrize("kind", KINDS)
def test_batches_begin_again_anywhere(kind: str, suffix: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / f"data.{kind}{suffix}", numbered(1000, 3000))
    file = file_of(path)
    found = list(batches(file))
    assert len(found) >= 3 and sum(batch.num_rows for batch in found) == 1000 == len(all_rows(found))
    assert all(len(batch.data) < 2 * BATCH_BYTES for batch in found)
    assert all(later.start == earlier.end or kind == "json" for earlier, later in pairwise(found))
    for index, batch in enumerate(found):
        assert list(batches(file, batch.end)) == found[index + 1 :]
        assert pickle.loads(pickle.dumps(batch)) == batch
    if kind == "jsonl" and not suffix:
        # In a plain file, what is before the start is not read.
        Path(path).write_bytes(b"?" * found[1].start.offset + Path(path).read_bytes()[found[1].start.offset :])
        assert list(batches(file, found[1].start)) == found[1:]


class _Trickle:
    """A stream that gives less than is asked for, as decompressing ones do."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        return self._stream.read(min(size, 7001))

    def __enter__(self) -> _Trickle:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


def test_how_much_a_read_gives_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {"question": "x" * 3 * BATCH_BYTES, "answer": "y"}
    file = file_of(write_rows(tmp_path / "data.jsonl", [*numbered(700, 3000), long, *numbered(700, 3000)]))
    found = list(batches(file))
    opened = lines.open_stream
    monkeypatch.setattr(lines, "open_stream", lambda *place: _Trickle(opened(*place)))
    assert len(found) > 4 and list(batches(file)) == found


@pytest.mark.parametrize("name", ("data.jsonl", "data.csv", "data.json", "data.txt", "data.jsonl.gz"))
def test_line_of_fifty_megabytes(name: str, tmp_path: Path) -> None:
    long = "é" * (25_000_000 if name == "data.jsonl" else 2_500_000)
    kind = name.split(".")[1]
    values = [{"text": text} for text in ("a", long, "b")]
    data = "\n".join(["a", long, "b"]).encode() if kind == "txt" else bytes_of(kind, values)
    path = write_bytes(tmp_path / name, data)
    assert [record.text for record in read_records(path)] == ["a", long, "b"], name


def test_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lines", "csv_rows", "json_array"):
        monkeypatch.setattr(f"data_shards.sources.{module}.MAX_RECORD_BYTES", 4 * BATCH_BYTES)
    cases = {
        "data.jsonl": (b'{"text": "' + b"x" * 6 * BATCH_BYTES, r"data\.jsonl: a line of more than 4 MiB"),
        "data.csv": (
            b'text\na\n"' + (b"x" * 1023 + b"\n") * (6 << 10),
            r"data\.csv:3: a row of more than 4 MiB: is a quote",
        ),
        "data.json": (
            b'[\n{"text": [' + b'"x",' * 1023 * (2 << 10),
            r"data\.json:2: not valid JSON: no value that ends",
        ),
    }
    for name, (data, message) in cases.items():
        with pytest.raises(DataError, match=message):
            list(read_records(write_bytes(tmp_path / name, data)))


BAD: dict[str, tuple[str, bytes, str]] = {
    "csv with another number of cells": ("csv", b"text,label\na,b\na,b,c\n", r":3: 3 cells, and the header has 2"),
    "csv with an open quote": ("csv", b'text\na\n"b\nc\n', r":3: not valid CSV \(unexpected end of data\)"),
    "csv with text behind a quote": ("csv", b'text\n"a"b\n', r":2: not valid CSV \(',' expected after '\"'\)"),
    "csv that names a column twice": ("csv", b"text,text\na,b\n", r":1: the header names 'text' more than once"),
    "csv without rows": ("csv", b"text\n", r": the file holds no records"),
    "csv not utf-8": ("csv", b"text\nok\nna\xefve\n", r":3: not UTF-8"),
    "csv with a NUL": ("csv", b"text\na\0b\n", r":2: a NUL byte at byte 1"),
    "csv in utf-16": ("csv", "text\na\n".encode("utf-16"), r":1: (a NUL byte|not UTF-8)"),
    "csv with messages that are no JSON": ("csv", b"messages\nhello\n", r":2: 'messages' must be a list .* JSON text"),
    "text not utf-8": ("txt", b"ok\n\xff\n", r":2: not UTF-8"),
    "text with a NUL": ("txt", b"ok\na\0\n", r":2: a NUL byte"),
    "text of blanks": ("txt", b" \n\t\n", r": the file holds no records"),
    "json of nothing": ("json", b"", r": the file holds no records"),
    "json of an empty list": ("json", b" [] ", r": the file holds no records"),
    "json of numbers": ("json", b'[{"text": "a"},\n 3]', r":2: a record must be a JSON object, this is int"),
    "json cut off in a record": ("json", b'[{"text": "a"},\n{"text": "b', r":2: not valid JSON: no value that ends"),
    "json cut off between": ("json", b'[{"text": "a"},\n{"text": "b"}\n', r":3: not valid JSON.*the file ends"),
    "json cut off behind": ("json", b'{"data": [{"text": "a"}\n]', r":2: not valid JSON around the array"),
    "json without a comma": ("json", b'[{"text": "a"}\n{"text": "b"}]', r":2: not valid JSON: expected , or \]"),
    "json with a comma more": ("json", b'[{"text": "a"},\n]', r":2: not valid JSON"),
    "json with more behind": ("json", b'[{"text": "a"}]\n\n[]', r":3: not valid JSON around the array"),
    "json not utf-8": ("json", b'[{"text": "a"},\n{"text": "\xff"}]', r":2: not valid JSON \('utf-8'"),
    "json broken within": ("json", b'[{"text": "a"},\n{"text" "b"}]', r":2: not valid JSON \(Expecting ':'"),
    "json nested without end": ("json", b"[" * 100_000, r":1: not valid JSON"),
    "jsonl as a gz that is none": ("jsonl.gz", b"", r"can't be read as jsonl, gz \(.*\)\. Is it complete"),
    "parquet that is none": ("parquet", b"PAR1 or not", r"can't be read as parquet \("),
    "arrow that is none": ("arrow", b"ARROW1 or not", r"can't be read as arrow \("),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_told_with_its_line(name: str, tmp_path: Path) -> None:
    kind, data, message = BAD[name]
    path = tmp_path / f"data.{kind}"
    path.write_bytes(data or (b"plain" if kind.endswith("gz") else b""))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}.*{message}"):
        list(read_records(str(path)))


@pytest.mark.parametrize("kind", ("jsonl.gz", "jsonl.zst", "parquet", "arrow", "csv.gz"))
def test_file_that_was_cut_off_is_refused(kind: str, tmp_path: Path) -> None:
    path = Path(write_rows(tmp_path / f"data.{kind}", numbered(2000, 200)))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: can't be read as .*Is it complete"):
        list(read_records(str(path)))


def test_table_with_text_that_is_none(tmp_path: Path) -> None:
    """Arrow checks nothing by itself: half a character, and offsets that point outside."""
    halves = pa.StringArray.from_buffers(
        3, pa.py_buffer(pa.array([0, 1, 2, 3], pa.int32()).buffers()[1]), pa.py_buffer(b"a\xffb")
    )
    pq.write_table(pa.table({"text": halves}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data\.parquet:2: this row can't be read \('utf-8'"):
        list(read_records(str(tmp_path / "data.parquet")))
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, pa.schema([("text", pa.string())])) as writer:
        writer.write_batch(pa.record_batch({"text": halves}))
    path = tmp_path / "data.arrow"
    path.write_bytes(sink.getvalue())
    with pytest.raises(DataError, match=r"data\.arrow: can't be read as arrow \(.*UTF8"):
        list(read_records(str(path)))
    offsets = np.array([0, 1, 2, 3], np.int32)
    path.write_bytes(sink.getvalue().replace(offsets.tobytes(), (offsets << 20).tobytes()))
    with pytest.raises(DataError, match=r"data\.arrow: can't be read as arrow \(.*offset"):
        list(read_records(str(path)))


def test_names_of_labels_in_a_table_are_used(tmp_path: Path) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows_ = {"text": ["Fine.", "Hm.", "?"], "label": [1, 0, -1]}
    datasets.Dataset.from_dict(rows_, features).to_parquet(tmp_path / "data.parquet")
    records = read_records(str(tmp_path / "data.parquet"))
    assert [next(records).messages[1]["content"] for _ in range(2)] == ["good", "bad"]
    with pytest.raises(DataError, match=r":3: 'label' is NoneType"):
        next(records)


def test_limit_counts_over_files_and_batches(tmp_path: Path) -> None:
    for number in range(3):
        write_rows(tmp_path / f"{number}.jsonl", numbered(1000, 3000))
    for limit in (1, 999, 1000, 1001, 2500, 9999):
        source = SourceConfig(path=str(tmp_path / "*.jsonl"), limit=limit)
        assert len(list(read_records(source))) == min(limit, 3000)
    path = str(tmp_path / "1.jsonl")
    assert len(list(read_records(parse_source(f"{path}#7")))) == 7


@pytest.mark.parametrize("limit", (None, 2600))
def test_source_goes_on_from_any_cursor(limit: int | None, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", numbered(1000, 3000))
    (tmp_path / "b.jsonl").write_bytes(b"\n")
    write_rows(tmp_path / "c.parquet", [{"text": str(number)} for number in range(2000)])
    source = SourceConfig(path=str(tmp_path / "*.*"), limit=limit)
    found = list(source_batches(source))
    assert len(found) > 3 and {batch.shape for batch in found} == {"columns", "text"}
    assert sum(len(list(batch.records())) for batch in found) == (limit or 3000)
    for index, batch in enumerate(found):
        assert list(source_batches(source, start=batch.end)) == found[index + 1 :]
        assert pickle.loads(pickle.dumps(batch)) == batch
    assert list(source_batches(source, start=SourceCursor())) == found


def test_short_form_and_names() -> None:
    assert parse_source("a/b.jsonl#500") == SourceConfig(path="a/b.jsonl", limit=500)
    assert parse_source("a#b.jsonl").path == "a#b.jsonl" and parse_source("a#1/b.jsonl").limit is None
    for path, name in {
        "a/train.jsonl.gz": "train",
        "data/*.jsonl": "data",
        "data/**/*.jsonl": "data",
        "s3://bucket/set/?endpoint_override=localhost:9": "set",
        "hf://org/qwen2.5": "qwen2.5",
        "*.jsonl": "*.jsonl",
        ".jsonl": ".jsonl",
    }.items():
        assert parse_source(path).name == name, path
    assert SourceConfig(path="a/b.jsonl", name="mine").name == "mine"
    with pytest.raises(ValueError, match="limit"):
        parse_source("a.jsonl#0")


def _tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(root / name, b'{"text": "a"}\n')


def test_files_come_in_the_order_of_their_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tree(
        tmp_path, "d/2.jsonl", "d/10.jsonl", "d/e/f/3.jsonl.gz", "d/e/1.JSONL", "d/.x.jsonl", "d/_x.jsonl", "d/README"
    )
    _tree(tmp_path, "d/dataset_infos.json", "d/.cache/1.jsonl", "other/1.jsonl", "d/[1].jsonl")

    def found(path: str) -> list[str]:
        return [file.uri for file in resolve(SourceConfig(path=path))]

    whole = ["d/10.jsonl", "d/2.jsonl", "d/[1].jsonl", "d/e/1.JSONL", "d/e/f/3.jsonl.gz"]
    monkeypatch.chdir(tmp_path)
    for root in ("", f"{tmp_path}/", f"file://{tmp_path}/"):
        assert found(f"{root}d") == [root + path for path in whole]
        assert found(f"{root}d/") == [root + path for path in whole]
        assert found(f"{root}d/*.jsonl") == [root + path for path in whole[:3]]
        assert found(f"{root}d/**/*.[Jj]*") == [root + path for path in whole]
        assert found(f"{root}*/1.jsonl") == [f"{root}other/1.jsonl"]
        assert found(f"{root}d/[1].jsonl") == [f"{root}d/[1].jsonl"]
        assert found(f"{root}d/e/[0-9].JSONL") == [f"{root}d/e/1.JSONL"]
    assert found("d/e/?.JSONL") == ["d/e/1.JSONL"]
    assert found("./d/*/*.JSONL") == ["d/e/1.JSONL"] and found("./d") == whole
    _tree(tmp_path, "a b/%1.jsonl")
    (file,) = resolve(SourceConfig(path=f"file://{tmp_path}/a%20b/*.jsonl"))
    assert [record.text for record in read_records(file.uri)] == ["a"]
    file = file_of("d/e/f/3.jsonl.gz")
    assert (file.kind, file.compression, file.size) == ("jsonl", "gz", (tmp_path / file.uri).stat().st_size)


REFUSED: dict[str, tuple[str, str]] = {
    "nothing there": ("nowhere", "no such file. Check data.train"),
    "no match": ("d/*.parquet", "no file matches"),
    "no such folder": ("nowhere/*.jsonl", "no file matches"),
    "unknown extension": ("d/README", "its name does not say what is in it. Known are .jsonl"),
    "unknown extension by a glob": ("d/*", "its name does not say what is in it"),
    "folder without data": ("empty", "no data file in this folder"),
    "folder of several kinds": ("mixed", r"several kinds (1 csv, 2 jsonl); say which by a glob"),
    "question mark in a URI": ("s3://bucket/?.jsonl", "as a wildcard use * or [abc]"),
    "unknown scheme": ("ftp9://host/x.jsonl", "can't be used"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_source_that_is_no_source(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _tree(tmp_path, "d/1.jsonl", "d/README", "empty/notes.md", "mixed/1.csv", "mixed/1.jsonl", "mixed/e/2.jsonl.zst")
    monkeypatch.chdir(tmp_path)
    path, message = REFUSED[name]
    with pytest.raises(DataError, match=re.escape(message)):
        resolve(SourceConfig(path=path))


def test_saved_dataset(tmp_path: Path) -> None:
    import datasets

    whole = datasets.Dataset.from_list(numbered(50))
    halves = whole.shuffle(seed=1).select(range(30))
    halves.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": whole, "test": halves}).save_to_disk(tmp_path / "dict")
    wanted = [row["question"] for row in halves]
    (tmp_path / "one" / "cache-1.arrow").write_bytes(b"")  # as datasets leaves them there
    for source in (
        SourceConfig(path=str(tmp_path / "one")),
        SourceConfig(path=str(tmp_path / "dict"), hf_split="test"),
    ):
        assert [record.messages[0]["content"] for record in read_records(source)] == wanted
    assert len(list(read_records(str(tmp_path / "dict")))) == 50
    with pytest.raises(DataError, match="has the splits train, test, not 'dev'; set hf_split"):
        resolve(SourceConfig(path=str(tmp_path / "dict"), hf_split="dev"))
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00003\.arrow: missing"):
        resolve(SourceConfig(path=str(tmp_path / "one")))


def test_dataset_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set" / "train.jsonl", numbered(5000))
    source = SourceConfig(path=f"hf://{tmp_path / 'set'}", hf_split="train[10:]")
    found = list(source_batches(source))
    records = [record for batch in found for record in batch.records()]
    assert contents(records) == contents(list(read_records(str(tmp_path / "set")))[10:])
    assert [record.line for record in records[:2]] == [1, 2] and len(found) > 1
    assert list(source_batches(source, start=found[0].end)) == found[1:]
    (file,), (other,) = resolve(source), resolve(SourceConfig(path=source.path))
    assert content_identity(file) != content_identity(other)
    with pytest.raises(DataError, match=r"^hf://.*set: can't be loaded \(ValueError: .*dev"):
        list(read_records(SourceConfig(path=source.path, hf_split="dev")))


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    one, two = (write_rows(tmp_path / f"{name}.jsonl", numbered(10)) for name in "ab")
    assert content_identity(file_of(one)) == content_identity(file_of(two))
    os.utime(one, (1, 1))
    assert content_identity(file_of(one)) == content_identity(file_of(two))
    write_rows(tmp_path / "b.jsonl", numbered(11))
    assert content_identity(file_of(one)) != content_identity(file_of(two))


MEASURE = """
import resource, sys
from data_shards.sources.records import read_records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = sum(1 for _ in read_records(sys.argv[1]))
print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ("jsonl.gz", "csv", "parquet"))
def test_memory_does_not_grow_with_the_file(kind: str, tmp_path: Path) -> None:
    """Peak resident memory of a process that reads 30 MB, over that before it began."""
    block = [{"text": os.urandom(500).hex()} for _ in range(1000)]
    path = write_rows(tmp_path / f"data.{kind}", block * 30)
    output = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True).stdout
    count, grown_kib = map(int, output.split())
    assert count == 30_000 and grown_kib < 24 * 1024, grown_kib


def _survives(data: bytes, path: Path) -> None:
    path.write_bytes(data)
    try:
        for record in read_records(str(path)):
            assert record.line >= 1 and len(record.digest()) == 16 and (record.text or record.messages)
    except DataError as error:
        assert str(error).startswith(str(path))


_SIGNS = (b"\n", b"\r\n", b'"', b",", b":", b"[", b"]", b"{", b"}", b"\0", b"\xef\xbb\xbf", b"1e999", b"\\ud83d")
_FRAGMENTS = (b'{"text": "', b'"}\n', b"text,label\n", b'{"messages": [{"role": "assistant", "content": "x"', b"}]}\n")
_PIECES: list[Callable[[], st.SearchStrategy[bytes]]] = [
    lambda: st.binary(max_size=20),
    lambda: st.sampled_from([*_SIGNS, *_FRAGMENTS]),
    lambda: st.text(max_size=10).map(lambda text: json.dumps({"text": text}).encode() + b"\n"),
]


@pytest.mark.parametrize("kind", ("jsonl", "json", "csv", "txt"))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.one_of(*(piece() for piece in _PIECES)), max_size=12))
def test_any_bytes_give_records_or_a_data_error(kind: str, pieces: list[bytes], tmp_path: Path) -> None:
    _survives(b"".join(pieces), tmp_path / f"data.{kind}")


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_KEYS = ("messages", "conversations", "prompt", "completion", "text", "label", "question", "answer", "tools", "role")
_INNER_KEYS = ("role", "content", "from", "value", "tool_calls", "weight", "train", "thinking", "name", "function")
_TURNS = st.lists(
    st.dictionaries(
        st.sampled_from(_INNER_KEYS), st.sampled_from(["user", "assistant", "gpt", "x", "function_call"]) | _VALUES
    ),
    max_size=3,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(st.sampled_from(_KEYS), _VALUES | _TURNS, max_size=5))
def test_any_object_gives_a_record_or_a_data_error(value: dict[str, Any], tmp_path: Path) -> None:
    _survives(json.dumps(value).encode(), tmp_path / "data.jsonl")
