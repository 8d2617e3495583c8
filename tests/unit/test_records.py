"""The four shapes of records, and what each bad input is told, with file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_shards.config import ColumnNames, RecordFormat
from data_shards.errors import BadInput, DataError
from data_shards.records import Record, read_records, recognise

GOOD: dict[RecordFormat, dict[str, Any]] = {
    RecordFormat.MESSAGES: {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]},
    RecordFormat.INSTRUCTION: {"instruction": "Hm?", "output": "Yes."},
    RecordFormat.COLUMNS: {"question": "Hm?", "answer": "Yes."},
    RecordFormat.TEXT: {"text": "Hm? Yes."},
}
ANSWERED = ({"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."})
ASSISTANT = {"role": "assistant", "content": "Yes."}
AUTO = RecordFormat.AUTO


def write_lines(path: Path, *lines: Any) -> str:
    """A jsonl file: bytes and strings as they are, all else as JSON."""
    with path.open("wb") as file:
        for line in lines:
            data = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            file.write(data + b"\n")
    return str(path)


def read(path: str, shape: RecordFormat = AUTO, columns: ColumnNames | None = None) -> list[Record]:
    return list(read_records(path, shape, columns))


@pytest.mark.parametrize("shape", GOOD)
@pytest.mark.parametrize("named", [True, False])
def test_shapes_are_recognised(shape: RecordFormat, named: bool, tmp_path: Path) -> None:
    assert recognise("x", 1, GOOD[shape], None) == shape
    path = write_lines(tmp_path / "data.jsonl", GOOD[shape])
    (record,) = read(path, shape if named else AUTO)
    if shape == RecordFormat.TEXT:
        assert record == Record(path, 1, text="Hm? Yes.")
    else:
        assert record == Record(path, 1, ANSWERED)


def test_instruction_input_follows_the_instruction(tmp_path: Path) -> None:
    base = {"instruction": "Add.", "output": "4"}
    path = write_lines(tmp_path / "data.jsonl", {**base, "input": "2 + 2"}, {**base, "input": ""}, base)
    assert [record.messages[0]["content"] for record in read(path)] == ["Add.\n\n2 + 2", "Add.", "Add."]


def test_all_roles_and_the_content_are_kept_as_they_are(tmp_path: Path) -> None:
    turns = [
        {"role": role, "content": f"  {role} ü🎉\n"} for role in ("system", "developer", "user", "tool", "assistant")
    ]
    (record,) = read(write_lines(tmp_path / "data.jsonl", {"messages": turns}))
    assert list(record.messages) == turns


def test_custom_columns(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"q": "Hm?", "a": "Yes.", "text": "other"})
    columns = ColumnNames(prompt="q", response="a")
    assert read(path, AUTO, columns) == read(path, RecordFormat.COLUMNS, columns) == [Record(path, 1, ANSWERED)]
    with pytest.raises(DataError, match=r"data\.jsonl:1: 'prompt' is missing; .*\['a', 'q', 'text'\]"):
        read(path, AUTO, ColumnNames(prompt="prompt", response="a"))


def test_lines_are_counted_with_the_blank_ones(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", "", GOOD[RecordFormat.TEXT], "  ", GOOD[RecordFormat.TEXT], "{")
    records = read_records(path, AUTO, None)
    assert [next(records).line, next(records).line] == [2, 4]
    with pytest.raises(DataError, match=r"data\.jsonl:5: not valid JSON"):
        next(records)


def test_last_line_without_its_end_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}')
    assert [record.text for record in read(str(path))] == ["one", "two"]


def _messages(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


BAD: dict[str, tuple[Any, str]] = {
    "broken json": ('{"text": "a', r"not valid JSON \(.*\); the line begins b'\{\"text\": \"a"),
    "two records": ('{"text": "a"} {"text": "b"}', "not valid JSON .*Extra data"),
    "not utf-8": (b'{"text": "\xff"}', "not valid JSON .*utf-8"),
    "too deep": ("[" * 100_000, "not valid JSON"),
    "list": ("[1]", "a record must be a JSON object, this is list"),
    "number": ("3", "a record must be a JSON object, this is int"),
    "null": ("null", "a record must be a JSON object, this is NoneType"),
    "unknown shape": (
        {"prompt": "x", "completion": "y"},
        r"can't tell the shape of a record with the keys \['completion', 'prompt'\].*data\.columns\.prompt",
    ),
    "no keys": ({}, r"can't tell the shape of a record with the keys \[\]"),
    "instruction without output": ({"instruction": "x"}, r"can't tell the shape .*\['instruction'\]"),
    "empty output": ({"instruction": "x", "output": " \n"}, "'output' is empty"),
    "empty answer": ({"question": "x", "answer": ""}, "'answer' is empty, so there is nothing to learn"),
    "null answer": ({"question": "x", "answer": None}, "'answer' is NoneType, not text"),
    "number as answer": ({"question": "x", "answer": 4}, "'answer' is int, not text"),
    "empty question": ({"question": "", "answer": "y"}, "'question' is empty"),
    "input not text": ({"instruction": "x", "input": ["y"], "output": "z"}, "'input' is list, not text"),
    "empty text": ({"text": "  "}, "'text' is empty"),
    "no messages": (_messages(), "'messages' must be a list of .* that is not empty"),
    "messages not a list": ({"messages": "x"}, "'messages' must be a list"),
    "no assistant": (_messages({"role": "user", "content": "x"}), "no assistant turn, so there is no answer to learn"),
    "empty assistant": (
        _messages({"role": "user", "content": "x"}, {"role": "assistant", "content": " "}),
        r"messages\[1\]: the assistant's answer is empty",
    ),
    "unknown role": (
        _messages({"role": "human", "content": "x"}, ASSISTANT),
        r"messages\[0\]: role 'human' is not one of system, developer, user, assistant, tool",
    ),
    "no role": (_messages({"from": "user", "content": "x"}, ASSISTANT), r"messages\[0\]: role None is not one of"),
    "role not text": (_messages(ASSISTANT, {"role": ["user"], "content": "x"}), r"messages\[1\]: role \['user'\] is"),
    "turn not an object": (_messages("x", ASSISTANT), r"messages\[0\]: role None is not one of"),
    "no content": (_messages({"role": "user"}, ASSISTANT), r"messages\[0\]: content is NoneType, not text"),
    "content in parts": (
        _messages(ASSISTANT, {"role": "user", "content": [{"type": "text", "text": "x"}]}),
        r"messages\[1\]: content is list, not text",
    ),
    # JSON can spell half a character, which no tokenizer and no UTF-8 file can hold.
    "half an emoji as text": ('{"text": "\\ud83d"}', "'text' .*half a character"),
    "half an emoji as answer": ('{"question": "x", "answer": "y\\udf89"}', "'answer' .*half a character"),
    "half an emoji in a turn": (
        '{"messages": [{"role": "user", "content": "\\ud83d"}, {"role": "assistant", "content": "y"}]}',
        r"messages\[0\]: content .*half a character",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_record_is_told_with_file_and_line(name: str, tmp_path: Path) -> None:
    line, message = BAD[name]
    path = write_lines(tmp_path / "data.jsonl", "", line)
    with pytest.raises(DataError, match=f"^{re.escape(path)}:2: {message}") as caught:
        read(path)
    assert isinstance(caught.value, BadInput) and not caught.value.retryable


@pytest.mark.parametrize("shape", GOOD)
def test_record_of_another_shape_than_the_first_is_refused(shape: RecordFormat, tmp_path: Path) -> None:
    other = {"unlike": "x"}
    path = write_lines(tmp_path / "data.jsonl", GOOD[shape], other)
    with pytest.raises(DataError, match=rf"^{re.escape(path)}:2: .*(is missing; .*\['unlike'\]|must be a list)"):
        read(path)


def test_whole_emoji_may_be_spelt_in_halves(tmp_path: Path) -> None:
    (record,) = read(write_lines(tmp_path / "data.jsonl", '{"text": "\\ud83c\\udf89"}'))
    assert record.text == "🎉"


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file_is_refused(content: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", content)
    with pytest.raises(DataError, match=f"^{re.escape(path)}: the file holds no records; each line should be"):
        read(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: no such file\. Check data\.train"):
            read(str(path))


def test_split_position_is_of_the_content_alone(tmp_path: Path) -> None:
    here, there = Record("a", 1, ANSWERED), Record("b", 9, ANSWERED)
    assert here.split_position() == there.split_position()
    positions = [Record("a", 1, text=f"text {number}").split_position() for number in range(1000)]
    assert len(set(positions)) == 1000 and all(0 <= position < 1 for position in positions)
    # Uniform, within five standard deviations of a binomial.
    assert abs(sum(position < 0.1 for position in positions) - 100) < 5 * 9.5
