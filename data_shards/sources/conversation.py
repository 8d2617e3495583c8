"""Turns of a conversation as records hold them: from ``messages`` and from ShareGPT's ``conversations``."""

from __future__ import annotations

from typing import Any

from data_shards.sources.fields import Fields
from data_shards.sources.strict_json import half_character, parse_json, problem_of

ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a turn's reasoning is found; the last is written as the first, which templates read."""

Turn = dict[str, Any]


def user(content: str) -> Turn:
    return {"role": "user", "content": content}


def assistant(content: str) -> Turn:
    return {"role": "assistant", "content": content}


def system(content: str) -> Turn:
    return {"role": "system", "content": content}


def messages(fields: Fields, column: str, found: Any) -> list[Turn]:
    """Turns of ``{role, content}``.

    Raises DataError for an unknown role, content that is not text, and an assistant's turn with nothing in it.
    """
    if not isinstance(found, list) or not found:
        raise fields.error(f"{column!r} must be a list of {{role, content}} that is not empty")
    return [_message(fields, f"{column}[{index}]", turn) for index, turn in enumerate(found)]


def _message(fields: Fields, where: str, given: Any) -> Turn:
    role = given.get("role") if isinstance(given, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise fields.error(f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
    return _turn(fields, where, role, given, given.get("content"))


def sharegpt(fields: Fields, column: str, found: Any) -> list[Turn]:
    """Turns of ``{from, value}``; ``function_call`` holds a call as JSON, ``observation`` what the tool gave."""
    if not isinstance(found, list) or not found:
        raise fields.error(f"{column!r} must be a list of {{from, value}} that is not empty")
    return [_sharegpt_turn(fields, f"{column}[{index}]", turn) for index, turn in enumerate(found)]


def _sharegpt_turn(fields: Fields, where: str, given: Any) -> Turn:
    if isinstance(given, dict) and "from" not in given and "role" in given:
        return _message(fields, where, given)
    sender = given.get("from") if isinstance(given, dict) else None
    if not isinstance(sender, str) or sender not in _SHAREGPT_ROLES:
        raise fields.error(f"{where}: from {sender!r} is not one of {', '.join(_SHAREGPT_ROLES)}")
    if sender == "function_call":
        call = _calls_of_text(fields, where, given.get("value"))
        return _turn(fields, where, "assistant", {**given, "tool_calls": call}, None)
    return _turn(fields, where, _SHAREGPT_ROLES[sender], given, given.get("value"))


def _calls_of_text(fields: Fields, where: str, value: Any) -> list[Turn]:
    try:
        calls = parse_json(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise fields.error(f"{where}: a function call must be JSON with name and arguments ({error})") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise fields.error(f"{where}: a function call must be JSON with name and arguments, or a list of them")
    return [{"type": "function", "function": call} for call in calls]


def _turn(fields: Fields, where: str, role: str, given: Turn, content: Any) -> Turn:
    turn: Turn = {"role": role, "content": _content(fields, where, content, given)}
    if role == "assistant":
        if given.get("tool_calls"):
            turn["tool_calls"] = _tool_calls(fields, where, given["tool_calls"])
        turn |= _reasoning(fields, where, given)
        if not turn["content"].strip() and len(turn) == 2:
            raise fields.error(f"{where}: the assistant's answer is empty")
    for key in ("tool_call_id", "name"):
        if given.get(key) not in (None, ""):
            turn[key] = _short_text(fields, where, key, given[key])
    weight = _weight(fields, where, role, given)
    return turn if weight is None else {**turn, "weight": weight}


def _content(fields: Fields, where: str, content: Any, given: Turn) -> str:
    if content is None and given.get("tool_calls"):
        return ""
    if isinstance(content, list):
        content = _joined(fields, where, content)
    if not isinstance(content, str):
        raise fields.error(f"{where}: content is {type(content).__name__}, not text")
    if problem := half_character(content):
        raise fields.error(f"{where}: content {problem}")
    return content


def _joined(fields: Fields, where: str, parts: list[Any]) -> str:
    """Content in parts, all of them text: what vision models' data looks like where it holds no image."""
    for index, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f"type {kind!r}" if isinstance(part, dict) else type(part).__name__
            raise fields.error(
                f'{where}: content[{index}] is {what}; only parts {{"type": "text", "text": …}} can be trained on'
            )
    return "".join(part["text"] for part in parts)


def _reasoning(fields: Fields, where: str, given: Turn) -> Turn:
    found: Turn = {}
    for key in _REASONING:
        if given.get(key) not in (None, ""):
            name = key if key != "reasoning" else "reasoning_content"
            found.setdefault(name, _short_text(fields, where, key, given[key]))
    return found


def _short_text(fields: Fields, where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise fields.error(f"{where}: {key} is {type(value).__name__}, not text")
    if problem := half_character(value):
        raise fields.error(f"{where}: {key} {problem}")
    return value


def _tool_calls(fields: Fields, where: str, value: Any) -> list[Turn]:
    """Calls as templates expect them: arguments as an object, though OpenAI's format has them as JSON text.

    So do inference servers before they render (vLLM's ``chat_utils._postprocess_messages``), and what is trained should
    be what is served.
    """
    calls = fields.objects(f"{where}.tool_calls", value)
    return [_with_parsed_arguments(fields, f"{where}.tool_calls[{index}]", call) for index, call in enumerate(calls)]


def _with_parsed_arguments(fields: Fields, where: str, call: Turn) -> Turn:
    if "function" in call:
        if not isinstance(call["function"], dict):
            raise fields.error(f"{where}: function is {type(call['function']).__name__}, not an object")
        return {**call, "function": _with_parsed_arguments(fields, where, call["function"])}
    if not isinstance(call.get("name"), str):
        raise fields.error(f"{where}: name is {type(call.get('name')).__name__}, not text")
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = parse_json(arguments)
        except (ValueError, RecursionError) as error:
            raise fields.error(f"{where}: arguments are text that is not JSON ({error})") from error
        if problem := problem_of(arguments):
            raise fields.error(f"{where}: arguments: {problem}")
    if arguments is not None and not isinstance(arguments, dict):
        raise fields.error(f"{where}: arguments are {type(arguments).__name__}, not an object")
    return {**call, "arguments": arguments or {}}


def _weight(fields: Fields, where: str, role: str, given: Turn) -> int | None:
    """``weight`` (0 or 1) or ``train`` (true or false): is this turn trained."""
    for key in ("weight", "train"):
        value = given.get(key)
        if value in (None, ""):
            continue
        if value not in (0, 1):
            raise fields.error(f"{where}: {key} {value!r} is neither 0 nor 1")
        if role == "assistant":
            return int(value)
        if value:
            raise fields.error(f"{where}: {key} {value!r} on a turn of {role}; only an assistant's turns are trained")
    return None
