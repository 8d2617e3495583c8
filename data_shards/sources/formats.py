"""Seven shapes of rows, and the record that each becomes. Pure.

messages: ``{"messages": [{role, content}, …], "tools"?}`` · sharegpt: ``{"conversations": [{from, value}, …]}`` ·
instruction: ``{"instruction", "input"?, "output", "system"?, "history"?}`` · prompt_completion: ``{"prompt",
"completion"}``, both text or both lists of turns · columns: ``{"question", "answer"}`` · classification: ``{"text",
"label"}`` · text: ``{"text"}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from data_shards.errors import DataError
from data_shards.sources import conversation
from data_shards.sources.batch import Row
from data_shards.sources.config import USUAL_COLUMNS, RecordFormat, SourceConfig, known_fields
from data_shards.sources.conversation import Turn, assistant, system, user
from data_shards.sources.fields import Fields, keys_of
from data_shards.sources.record import Record

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def shape_of(row: Row, source: SourceConfig) -> RecordFormat:
    """The shape of a record: as the source says, or by its keys. Raises DataError where none fits."""
    if source.format != RecordFormat.AUTO:
        return source.format
    named = set(source.named_columns())
    fitting = [shape for shape in USUAL_COLUMNS if named <= known_fields(shape)]
    for shape in fitting:
        columns = source.column_of(shape)
        if all(columns[field] in row.value for field in USUAL_COLUMNS[shape]):
            return shape
    if named:
        return fitting[-1]  # It will say what is missing.
    known = ", ".join(" and ".join(columns.values()) for columns in USUAL_COLUMNS.values())
    raise row.error(
        f"can't tell the shape of a record with the keys {keys_of(row.value)}. Expected {known}; for two other columns "
        "set data.columns.prompt and data.columns.response"
    )


def normaliser(shape: RecordFormat, source: SourceConfig) -> Callable[[Row], Record]:
    """Rows of one shape to records; it raises DataError with file, line, key and what was expected."""
    columns, normalise = source.column_of(shape), _NORMALISE[shape]
    required = [columns[field] for field in USUAL_COLUMNS[shape]]

    def to_record(row: Row) -> Record:
        if any(column not in row.value for column in required):
            raise _unlike_the_first(row, shape, source)
        return normalise(row, Fields(row, columns), source)

    return to_record


def _unlike_the_first(row: Row, shape: RecordFormat, source: SourceConfig) -> DataError:
    columns = source.column_of(shape)
    missing = next(columns[field] for field in USUAL_COLUMNS[shape] if columns[field] not in row.value)
    problem = f"{missing!r} is missing; the record has the keys {keys_of(row.value)}"
    if source.format == RecordFormat.AUTO and source.columns is None:
        try:
            other = shape_of(row, source)
            problem += (
                f". It looks like {other.value}, and the file's first record like {shape.value}: give each a file"
            )
        except DataError:
            problem += f", and the file's first record looks like {shape.value}"
    return row.error(problem)


def _of_turns(row: Row, source: SourceConfig, turns: list[Turn], tools: Any = None) -> Record:
    if all(turn["role"] != "assistant" for turn in turns):
        raise row.error("no assistant turn, so there is no answer to learn")
    return Record(row.path, row.line, tuple(turns), tools=tools, source=source.name)


def _tools(fields: Fields) -> tuple[dict[str, Any], ...] | None:
    found = fields.get("tools")
    return tuple(fields.objects(fields.column("tools"), found)) or None if found else None


def _messages(row: Row, fields: Fields, source: SourceConfig) -> Record:
    found = fields.items("messages", "a list of {role, content}")
    turns = conversation.messages(fields, fields.column("messages"), found)
    return _of_turns(row, source, turns, _tools(fields))


def _sharegpt(row: Row, fields: Fields, source: SourceConfig) -> Record:
    found = fields.items("conversations", "a list of {from, value}")
    turns = conversation.sharegpt(fields, fields.column("conversations"), found)
    prompt = fields.optional_text("system")
    if prompt is not None:
        if turns[0]["role"] == "system":
            raise fields.error(f"{fields.column('system')!r} and a first turn of system: which shall it be?")
        turns.insert(0, system(prompt))
    return _of_turns(row, source, turns, _tools(fields))


def _instruction(row: Row, fields: Fields, source: SourceConfig) -> Record:
    prompt, more = fields.text("instruction"), fields.optional_text("input")
    if more is not None:
        prompt += "\n\n" + more
    return _of_turns(row, source, [*_system(fields), *_history(fields), user(prompt), assistant(fields.text("output"))])


def _system(fields: Fields) -> list[Turn]:
    found = fields.optional_text("system")
    return [] if found is None else [system(found)]


def _history(fields: Fields) -> list[Turn]:
    """Earlier turns: a list of [question, answer]."""
    turns: list[Turn] = []
    column = fields.column("history")
    for index, pair in enumerate(fields.items("history", "a list of [question, answer]") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise fields.error(f"{column}[{index}] must be a pair of question and answer")
        turns += conversation.messages(fields, column, [user(pair[0]), assistant(pair[1])])
    return turns


def _prompt_completion(row: Row, fields: Fields, source: SourceConfig) -> Record:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if not isinstance(prompt, list) and not isinstance(completion, list):
        if not _is_json_list(prompt) or not _is_json_list(completion):
            turns = [user(fields.text("prompt")), assistant(fields.text("completion"))]
            return _of_turns(row, source, turns, _tools(fields))
    elif isinstance(prompt, list) != isinstance(completion, list):
        raise fields.error(
            f"{fields.column('prompt')!r} is {type(prompt).__name__} and {fields.column('completion')!r} is "
            f"{type(completion).__name__}; both must be text, or both lists of {{role, content}}"
        )
    before, after = (_turns_of(fields, field) for field in ("prompt", "completion"))
    if all(turn["role"] != "assistant" for turn in after):
        raise fields.error(f"{fields.column('completion')!r} has no assistant turn, so there is no answer to learn")
    # Only the completion is learnt (TRL's completion_only_loss), whoever speaks in the prompt.
    untrained = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in before]
    return _of_turns(row, source, untrained + after, _tools(fields))


def _is_json_list(value: Any) -> bool:
    """A list of turns in a csv cell."""
    return isinstance(value, str) and value.startswith('[{"') and value.endswith("}]")


def _turns_of(fields: Fields, field: str) -> list[Turn]:
    return conversation.messages(fields, fields.column(field), fields.items(field, "a list of {role, content}"))


def _columns(row: Row, fields: Fields, source: SourceConfig) -> Record:
    before = _system(fields) if fields.column("system") else []
    return _of_turns(row, source, [*before, user(fields.text("prompt")), assistant(fields.text("response"))])


def _classification(row: Row, fields: Fields, source: SourceConfig) -> Record:
    fields.text("text")
    prompt = _PLACEHOLDER.sub(lambda found: _placed(row, fields, found[1]), source.prompt_template)
    return _of_turns(row, source, [user(prompt), assistant(_label(fields, source.label_names))])


def _placed(row: Row, fields: Fields, name: str) -> str:
    """A column's text for the prompt; ``{text}`` is the text, whatever its column is called."""
    if name == "text":
        return fields.text("text")
    return Fields(row, {name: name}).text(name)


def _label(fields: Fields, names: tuple[str, ...] | None) -> str:
    """The label's name; a number without names is its own."""
    value, column = fields.get("label"), fields.column("label")
    if isinstance(value, str):
        text = fields.text("label")
        if names is None or text in names:
            return text
        value = int(text) if text.isascii() and text.isdigit() else text
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise fields.error(f"{column!r} is {type(value).__name__}; expected a label's name or number")
    if names is None:
        return str(value)
    if isinstance(value, str) or not 0 <= value < len(names):
        raise fields.error(f"{column!r} {value!r} is not one of label_names ({len(names)}: {', '.join(names)[:200]})")
    return names[value]


def _text(row: Row, fields: Fields, source: SourceConfig) -> Record:
    return Record(row.path, row.line, text=fields.text("text"), source=source.name)


_NORMALISE: dict[RecordFormat, Callable[[Row, Fields, SourceConfig], Record]] = {
    RecordFormat.MESSAGES: _messages,
    RecordFormat.SHAREGPT: _sharegpt,
    RecordFormat.INSTRUCTION: _instruction,
    RecordFormat.PROMPT_COMPLETION: _prompt_completion,
    RecordFormat.COLUMNS: _columns,
    RecordFormat.CLASSIFICATION: _classification,
    RecordFormat.TEXT: _text,
}
