"""Which fields of a conversation a template leaves out. What it does not print would be lost without a word."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from data_shards.encoding.turn_bounds import Messages, Tools

_STAND_IN = "BatonStandsInForThisField2e6b"
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Field(StrEnum):
    TOOLS = "tools"
    TOOL_CALLS = "tool_calls"
    REASONING = "reasoning_content"


def fields_of(messages: Messages, tools: Tools | None) -> list[Field]:
    """Those of the three that hold something here."""
    present = [Field.TOOLS] if tools else []
    if all(len(message) == 2 for message in messages):  # role and content: most conversations
        return present
    if any(message.get("tool_calls") for message in messages):
        present.append(Field.TOOL_CALLS)
    if any(message.get(key) for message in messages for key in _REASONING):
        present.append(Field.REASONING)
    return present


def without(field: Field, messages: Messages, tools: Tools | None) -> tuple[Messages, Tools | None]:
    """The conversation as if it had nothing in that field."""
    if field == Field.TOOLS:
        return messages, None
    dropped = _REASONING if field == Field.REASONING else (field.value,)
    return [{key: value for key, value in message.items() if key not in dropped} for message in messages], tools


def _probe(field: Field) -> tuple[Messages, Tools | None]:
    """The shortest conversation that has the field, in the form that transformers documents."""
    user, assistant = {"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Yes."}
    if field == Field.TOOLS:
        nothing = {"type": "object", "properties": {}}
        function = {"name": _STAND_IN, "description": _STAND_IN, "parameters": nothing}
        return [user, assistant], [{"type": "function", "function": function}]
    if field == Field.TOOL_CALLS:
        call = {"id": "baton1234", "type": "function", "function": {"name": _STAND_IN, "arguments": {}}}
        return [user, {"role": "assistant", "content": "", "tool_calls": [call]}], None
    return [user, assistant | {field.value: _STAND_IN}], None


class UnusedFields:
    """Remembers which fields one template prints: it is asked once for each, with a conversation made for it.

    Where it refuses that one, it is asked with the record itself: rendered with the field and without.
    """

    def __init__(self, render: Callable[[Messages, Tools | None], str]) -> None:
        self._render = render
        self._printed: dict[Field, bool | None] = {}

    def find(self, messages: Messages, tools: Tools | None) -> str | None:
        """The first field that is not printed, with an example of what it holds, or None. Raises what it raises."""
        for field in fields_of(messages, tools):
            if not self._is_printed(field, messages, tools):
                return f"{field.value} ({_example(field, messages, tools)})"
        return None

    def _is_printed(self, field: Field, messages: Messages, tools: Tools | None) -> bool:
        if field not in self._printed:
            self._printed[field] = self._ask(field)
        if (printed := self._printed[field]) is not None:
            return printed
        return self._render(messages, tools) != self._render(*without(field, messages, tools))

    def _ask(self, field: Field) -> bool | None:
        try:
            return _STAND_IN in self._render(*_probe(field))
        except Exception:  # Foreign code, which may want more of a conversation than the probe has.
            return None


def _example(field: Field, messages: Messages, tools: Tools | None) -> str:
    if field == Field.TOOLS:
        return _shortened(tools)
    keys = _REASONING if field == Field.REASONING else (field.value,)
    index, value = next((i, m[key]) for i, m in enumerate(messages) for key in keys if m.get(key))
    return f"messages[{index}]: {_shortened(value)}"


def _shortened(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:60] + "…"
