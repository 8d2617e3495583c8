"""JSON as records hold it."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 64
"""Deeper values would end in a recursion error somewhere behind: in a template, in pickling, in another writer."""


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refuse)
"""As the standard has it: no NaN, no infinity."""

parse_json = DECODER.decode
"""Raises ValueError or RecursionError."""


def half_character(text: str) -> str | None:
    """What is wrong with a text that no UTF-8 file and no tokenizer can hold: JSON can spell half a character."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has half a character ({text[error.start]!r}, a lone surrogate) at {error.start}"
    return None


def problem_of(value: Any, depth: int = 0) -> str | None:
    """What keeps a nested value from being written as JSON again, or None."""
    if isinstance(value, str):
        return half_character(value)
    if value is None or isinstance(value, bool | int):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"holds {value}, which JSON can't say"
    if depth == MAX_DEPTH:
        return f"is nested more than {MAX_DEPTH} deep"
    if isinstance(value, list):
        return next(filter(None, (problem_of(item, depth + 1) for item in value)), None)
    if isinstance(value, dict):
        parts = [part for pair in value.items() for part in pair]
        if not all(isinstance(key, str) for key in value):
            return "has a key that is not text"
        return next(filter(None, (problem_of(part, depth + 1) for part in parts)), None)
    return f"holds {type(value).__name__}, which JSON can't say"
