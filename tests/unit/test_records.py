"""The shapes of records, and what each bad input is told, with file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from data_shards.config import ColumnNames, RecordFormat
from data_shards.errors import BadInput, DataError
from data_shards.sources.batch import Row
from data_shards.sources.config import SourceConfig
from data_shards.sources.formats import shape_of
from data_shards.sources.records import Record, read_records

GOOD: dict[RecordFormat, dict[str, Any]] = {
    RecordFormat.MESSAGES: {"messages": [{"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}]},
    RecordFormat.SHAREGPT: {"conversations": [{"from": "human", "value": "Hm?"}, {"from": "gpt", "value": "Yes."}]},
    RecordFormat.INSTRUCTION: {"instruction": "Hm?", "output": "Yes."},
    RecordFormat.PROMPT_COMPLETION: {"prompt": "Hm?", "completion": "Yes."},
    RecordFormat.CLASSIFICATION: {"text": "Hm?", "label": "Yes."},
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


def read_source(path: str, **options: Any) -> list[Record]:
    return list(read_records(SourceConfig(path=path, **options)))


@pytest.mark.parametrize("shape", GOOD)
@pytest.mark.parametrize("named", [True, False])
def test_shapes_are_recognised(shape: RecordFormat, named: bool, tmp_path: Path) -> None:
    assert shape_of(Row("x", 1, GOOD[shape]), SourceConfig(path="x")) == shape
    path = write_lines(tmp_path / "data.jsonl", GOOD[shape])
    (record,) = read(path, shape if named else AUTO)
    if shape == RecordFormat.TEXT:
        assert record == Record(path, 1, text="Hm? Yes.", source="data")
    else:
        assert record == Record(path, 1, ANSWERED, source="data")


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
    assert (
        read(path, AUTO, columns)
        == read(path, RecordFormat.COLUMNS, columns)
        == [Record(path, 1, ANSWERED, source="data")]
    )
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
        {"ask": "x", "reply": "y"},
        r"can't tell the shape of a record with the keys \['ask', 'reply'\].*data\.columns\.prompt",
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
    "content with an image": (
        _messages(ASSISTANT, {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url"}]}),
        r"messages\[1\]: content\[1\] is type 'image_url'; only parts .* can be trained on",
    ),
    "content in broken parts": (
        _messages(ASSISTANT, {"role": "user", "content": ["x"]}),
        r"messages\[1\]: content\[0\] is str; only parts",
    ),
    "messages as text": ({"messages": "[{"}, "'messages' must be a list .* JSON text of it; .* not JSON"),
    "messages as number": ({"messages": 3}, "'messages' must be a list of .*, this is int"),
    "weight of a half": (_messages(ASSISTANT | {"weight": 0.5}), r"messages\[0\]: weight 0\.5 is neither 0 nor 1"),
    "weight of a user": (
        _messages(ASSISTANT, {"role": "user", "content": "x", "train": True}),
        r"messages\[1\]: train True on a turn of user",
    ),
    "tools that are none": ({**_messages(ASSISTANT), "tools": [1]}, "'tools' must be a list of objects, .*with int"),
    "tools that are no JSON": ({**_messages(ASSISTANT), "tools": "f(x)"}, "'tools' must be a list of objects, or JSON"),
    "tools nested without end": (
        '{"messages": [{"role": "assistant", "content": "x"}], "tools": [{"a": ' + "[" * 200 + "]" * 200 + "}]}",
        "'tools' is nested more than 64 deep",
    ),
    "infinity in tools": (
        '{"messages": [{"role": "assistant", "content": "x"}], "tools": [{"a": 1e999}]}',
        "'tools' holds inf",
    ),
    "not a number": ('{"text": "x", "score": NaN}', "not valid JSON .NaN is not JSON"),
    "a huge number": ('{"text": "x", "score": ' + "1" * 5000 + "}", "not valid JSON .*limit"),
    "raw control character": (b'{"text": "a\0b"}', "not valid JSON .*control character"),
    "call without name": (
        _messages(ASSISTANT | {"tool_calls": [{"function": {"arguments": {}}}]}),
        r"messages\[0\]\.tool_calls\[0\]: name is NoneType",
    ),
    "call of broken arguments": (
        _messages(ASSISTANT | {"tool_calls": [{"function": {"name": "f", "arguments": '{"a": '}}]}),
        r"messages\[0\]\.tool_calls\[0\]: arguments are text that is not JSON",
    ),
    "call of a list": (
        _messages(ASSISTANT | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}),
        r"messages\[0\]\.tool_calls\[0\]: arguments are list, not an object",
    ),
    "reasoning not text": (_messages(ASSISTANT | {"thinking": ["x"]}), r"messages\[0\]: thinking is list, not text"),
    "sharegpt without a sender": ({"conversations": [{"value": "x"}]}, r"conversations\[0\]: from None is not one of"),
    "sharegpt with a broken call": (
        {"conversations": [{"from": "function_call", "value": "f(x)"}]},
        r"conversations\[0\]: a function call must be JSON",
    ),
    "sharegpt with two systems": (
        {"system": "x", "conversations": [{"from": "system", "value": "y"}, {"from": "gpt", "value": "z"}]},
        "'system' and a first turn of system",
    ),
    "history of triples": (
        {"instruction": "x", "output": "y", "history": [["a", "b", "c"]]},
        r"history\[0\] must be a pair",
    ),
    "prompt as turns, completion as text": (
        {"prompt": [{"role": "user", "content": "x"}], "completion": "y"},
        "'prompt' is list and 'completion' is str; both must be text, or both lists",
    ),
    "completion without an answer": (
        {"prompt": [ASSISTANT], "completion": [{"role": "user", "content": "y"}]},
        "'completion' has no assistant turn",
    ),
    "label missing": ({"text": "x", "label": None}, "'label' is NoneType; expected a label's name or number"),
    "label a truth": ({"text": "x", "label": True}, "'label' is bool"),
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
    with pytest.raises(DataError, match=rf"^{re.escape(path)}:2: .*is missing; .*\['unlike'\]"):
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
    path = tmp_path / "nowhere.jsonl"
    with pytest.raises(DataError, match=rf"^{re.escape(str(path))}: no such file\. Check data\.train"):
        read(str(path))


def test_mixture_of_shapes_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", GOOD[RecordFormat.TEXT], "", GOOD[RecordFormat.MESSAGES])
    message = r"data\.jsonl:3: 'text' is missing; .*\['messages'\]\. It looks like messages, and .* like text"
    with pytest.raises(DataError, match=message):
        read(path)


def test_turns_keep_calls_reasoning_and_weights(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "and?"}], "weight": 0},
        {"role": "assistant", "content": None, "tool_calls": [call], "train": False, "unknown": 1},
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "Two.", "reasoning": "Hm.", "thinking": "Hm!", "weight": 1.0},
    ]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    wanted = (
        {"role": "user", "content": "One and?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call | {"function": {"name": "add", "arguments": {"a": 1, "b": None}}}],
            "weight": 0,
        },
        {"role": "tool", "content": "2", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "Two.", "thinking": "Hm!", "reasoning_content": "Hm.", "weight": 1},
    )
    path = write_lines(
        tmp_path / "data.jsonl",
        {"messages": turns, "tools": tools},
        {"messages": json.dumps(turns), "tools": json.dumps(tools)},
    )
    for record in read(path):
        assert record.messages == wanted and record.tools == tuple(tools)


def test_sharegpt_senders(tmp_path: Path) -> None:
    record = {
        "system": "Be brief.",
        "tools": "[]",
        "conversations": [
            {"from": "human", "value": "Sum?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "One.", "weight": 1},
            {"role": "user", "content": "Thanks."},
            {"from": "assistant", "value": "Hm.", "train": False},
        ],
    }
    (found,) = read(write_lines(tmp_path / "data.jsonl", record))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert found.tools is None and found.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Sum?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "One.", "weight": 1},
        {"role": "user", "content": "Thanks."},
        {"role": "assistant", "content": "Hm.", "weight": 0},
    )


def test_instruction_with_system_and_history(tmp_path: Path) -> None:
    record = {
        "instruction": "And?",
        "output": "Yes.",
        "system": "Be brief.",
        "history": [["Hm?", "No."]],
        "input": None,
    }
    (found,) = read(write_lines(tmp_path / "data.jsonl", record))
    assert [(turn["role"], turn["content"]) for turn in found.messages] == [
        ("system", "Be brief."),
        ("user", "Hm?"),
        ("assistant", "No."),
        ("user", "And?"),
        ("assistant", "Yes."),
    ]


def test_prompt_as_turns_is_not_trained(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "Hm?"}, ASSISTANT, {"role": "user", "content": "So?"}]
    (found,) = read(write_lines(tmp_path / "data.jsonl", {"prompt": prompt, "completion": [ASSISTANT]}))
    assert found.messages == (prompt[0], ASSISTANT | {"weight": 0}, prompt[2], ASSISTANT)


@pytest.mark.parametrize("label", [1, "1", "good"])
def test_classification_by_name_or_number(label: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"sentence": "Fine.", "by": "Ann", "label": label})
    (found,) = read_source(
        path, columns={"text": "sentence"}, label_names=["bad", "good"], prompt_template="{by} says: {text}"
    )
    assert [turn["content"] for turn in found.messages] == ["Ann says: Fine.", "good"]
    (plain,) = read_source(path, columns={"text": "sentence"})
    assert [turn["content"] for turn in plain.messages] == ["Fine.", str(label)]


@pytest.mark.parametrize("label", [2, -1, "2", "fair"])
def test_label_without_a_name_is_refused(label: Any, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"text": "Fine.", "label": label})
    with pytest.raises(DataError, match=r":1: 'label' .* is not one of label_names \(2: bad, good\)"):
        read_source(path, label_names=["bad", "good"])


def test_every_format_has_its_column_names(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"talk": GOOD[RecordFormat.MESSAGES]["messages"]}, {"messages": "talk"}),
        ({"talk": GOOD[RecordFormat.SHAREGPT]["conversations"]}, {"conversations": "talk"}),
        ({"do": "Hm?", "done": "Yes."}, {"instruction": "do", "output": "done"}),
        ({"ask": "Hm?", "completion": "Yes."}, {"prompt": "ask"}),
        ({"ask": "Hm?", "answer": "Yes."}, {"prompt": "ask"}),
        ({"ask": "Hm?", "label": "Yes."}, {"text": "ask"}),
    ]
    for record, columns in cases:
        (found,) = read_source(write_lines(tmp_path / "data.jsonl", record), columns=columns)
        assert found.messages == ANSWERED, columns
    (found,) = read_source(write_lines(tmp_path / "data.jsonl", {"body": "Hm."}), columns={"text": "body"})
    assert found.text == "Hm."


def test_columns_that_no_format_has_together() -> None:
    with pytest.raises(ValueError, match=r"columns names completion, response; no format has all of them"):
        SourceConfig(path="x", columns=ColumnNames(completion="a", response="b"))
    with pytest.raises(ValueError, match=r"columns names response; .*text: text"):
        SourceConfig(path="x", format=RecordFormat.TEXT, columns=ColumnNames(response="b"))
    with pytest.raises(ValueError, match="names no column in braces"):
        SourceConfig(path="x", prompt_template="Which?")


def test_digest_is_of_all_content_and_nothing_else() -> None:
    tools = ({"name": "f"},)
    weighted = (ANSWERED[0], ANSWERED[1] | {"weight": 0})
    different = [
        Record("a", 1, ANSWERED),
        Record("a", 1, ANSWERED, tools=tools),
        Record("a", 1, weighted),
        Record("a", 1, ANSWERED[1:]),
        Record("a", 1, text="Yes."),
    ]
    assert len({record.digest() for record in different}) == len(different)
    assert Record("b", 9, ANSWERED, source="s").digest() == different[0].digest() and len(different[0].digest()) == 16
    reordered = tuple(dict(reversed(turn.items())) for turn in ANSWERED)
    assert Record("a", 1, reordered).digest() == different[0].digest()
    assert Record("a", 1, weighted).split_position() == different[0].split_position()


def test_split_position_is_of_the_content_alone(tmp_path: Path) -> None:
    here, there = Record("a", 1, ANSWERED), Record("b", 9, ANSWERED)
    assert here.split_position() == there.split_position()
    positions = [Record("a", 1, text=f"text {number}").split_position() for number in range(1000)]
    assert len(set(positions)) == 1000 and all(0 <= position < 1 for position in positions)
    # Uniform, within five standard deviations of a binomial.
    assert abs(sum(position < 0.1 for position in positions) - 100) < 5 * 9.5
