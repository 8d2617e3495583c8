"""Records from jsonl, in four shapes, each with its file and line.

Shapes: ``{"messages": [{"role", "content"}, …]}`` · ``{"instruction", "input"?, "output"}`` · two columns, by default
``{"question", "answer"}`` · ``{"text"}``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_shards import signed_json
from data_shards.config import ColumnNames, RecordFormat
from data_shards.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """A conversation or a plain text, normalised."""

    path: str
    line: int
    """counts from 1"""
    messages: tuple[dict[str, str], ...] = ()
    text: str | None = None

    def error(self, problem: str) -> DataError:
        return DataError.at(self.path, self.line, problem)

    def split_position(self) -> float:
        """In [0, 1), from the content alone: where a fractional split puts this record, whatever is around it."""
        content = signed_json.canonical([list(self.messages), self.text])
        return xxhash.xxh3_64(content).intdigest() / 2**64


def read_records(path: str, record_format: RecordFormat, columns: ColumnNames | None) -> Iterator[Record]:
    """Records of a jsonl file, in its order; blank lines are skipped.

    Raises:
        DataError: no such file, nothing in it, a line that is not a JSON object, or a record that lacks something.
    """
    file_path = Path(path)
    if not file_path.is_file():
        raise DataError(
            f"{path}: no such file. Check data.train and data.validation; paths are relative to where you run"
        )
    shape = record_format
    found = False
    with file_path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            value = _parse(path, number, line)
            if shape == RecordFormat.AUTO:
                shape = recognise(path, number, value, columns)
            found = True
            yield _NORMALISE[shape](path, number, value, columns or ColumnNames())
    if not found:
        raise DataError(f"{path}: the file holds no records; each line should be one JSON object")


def _parse(path: str, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError.at(path, number, f"not valid JSON ({error}); the line begins {line[:60]!r}") from error
    if not isinstance(value, dict):
        raise DataError.at(path, number, f"a record must be a JSON object, this is {type(value).__name__}")
    return value


def recognise(path: str, number: int, value: dict[str, Any], columns: ColumnNames | None) -> RecordFormat:
    """The shape of a record by its keys. Raises DataError where none fits."""
    if columns is not None:
        return RecordFormat.COLUMNS
    if "messages" in value:
        return RecordFormat.MESSAGES
    if "instruction" in value and "output" in value:
        return RecordFormat.INSTRUCTION
    if "question" in value and "answer" in value:
        return RecordFormat.COLUMNS
    if "text" in value:
        return RecordFormat.TEXT
    raise DataError.at(
        path,
        number,
        f"can't tell the shape of a record with the keys {sorted(value)}. Expected messages, instruction and output, "
        "question and answer, or text; for two other columns set data.columns.prompt and data.columns.response",
    )


def _check_characters(path: str, number: int, name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError.at(
            path, number, f"{name} has half a character ({text[error.start]!r}, a lone surrogate) at {error.start}"
        ) from error


def _text_of(path: str, number: int, value: dict[str, Any], key: str, *, empty_is_fine: bool = False) -> str:
    found = value.get(key)
    if not isinstance(found, str):
        what = "is missing" if key not in value else f"is {type(found).__name__}, not text"
        raise DataError.at(path, number, f"{key!r} {what}; the record has the keys {sorted(value)}")
    _check_characters(path, number, repr(key), found)
    if not found.strip() and not empty_is_fine:
        raise DataError.at(path, number, f"{key!r} is empty, so there is nothing to learn from this record")
    return found


def _messages(path: str, number: int, value: dict[str, Any], columns: ColumnNames) -> Record:
    messages = value.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError.at(path, number, "'messages' must be a list of {role, content} that is not empty")
    turns = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise DataError.at(path, number, f"messages[{index}]: role {role!r} is not one of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str):
            raise DataError.at(path, number, f"messages[{index}]: content is {type(content).__name__}, not text")
        _check_characters(path, number, f"messages[{index}]: content", content)
        if role == "assistant" and not content.strip():
            raise DataError.at(path, number, f"messages[{index}]: the assistant's answer is empty")
        turns.append({"role": role, "content": content})
    if all(turn["role"] != "assistant" for turn in turns):
        raise DataError.at(path, number, "no assistant turn, so there is no answer to learn")
    return Record(path, number, tuple(turns))


def _instruction(path: str, number: int, value: dict[str, Any], columns: ColumnNames) -> Record:
    prompt = _text_of(path, number, value, "instruction")
    if value.get("input"):
        prompt += "\n\n" + _text_of(path, number, value, "input", empty_is_fine=True)
    return _pair(path, number, prompt, _text_of(path, number, value, "output"))


def _columns(path: str, number: int, value: dict[str, Any], columns: ColumnNames) -> Record:
    return _pair(
        path, number, _text_of(path, number, value, columns.prompt), _text_of(path, number, value, columns.response)
    )


def _text(path: str, number: int, value: dict[str, Any], columns: ColumnNames) -> Record:
    return Record(path, number, text=_text_of(path, number, value, "text"))


def _pair(path: str, number: int, prompt: str, response: str) -> Record:
    return Record(path, number, ({"role": "user", "content": prompt}, {"role": "assistant", "content": response}))


_NORMALISE = {
    RecordFormat.MESSAGES: _messages,
    RecordFormat.INSTRUCTION: _instruction,
    RecordFormat.COLUMNS: _columns,
    RecordFormat.TEXT: _text,
}
