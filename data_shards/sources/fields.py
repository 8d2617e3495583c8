"""A row's values under the names that its format knows them by, and what is said about one that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_shards.errors import DataError
from data_shards.sources.batch import Row
from data_shards.sources.strict_json import half_character, parse_json, problem_of

_MOST_KEYS = 20


def keys_of(value: Mapping[str, Any]) -> str:
    """The keys of a record, for a message."""
    keys = sorted(value)
    return f"{keys[:_MOST_KEYS]}" + (f" and {len(keys) - _MOST_KEYS} more" if len(keys) > _MOST_KEYS else "")


class Fields:
    """One row. Every method raises DataError with file, line and column where the value is not what it should be."""

    def __init__(self, row: Row, column_of: Mapping[str, str]) -> None:
        self._row = row
        self._column_of = column_of

    def error(self, problem: str) -> DataError:
        return self._row.error(problem)

    def column(self, field: str) -> str:
        return self._column_of[field]

    def get(self, field: str) -> Any:
        """The value; None where there is none, or an empty cell."""
        found = self._row.value.get(self._column_of[field])
        return None if found == "" else found

    def text(self, field: str) -> str:
        """Text that says something."""
        found = self._text(field)
        if not found.strip():
            raise self.error(f"{self.column(field)!r} is empty, so there is nothing to learn from this record")
        return found

    def optional_text(self, field: str) -> str | None:
        return None if self.get(field) is None else self._text(field)

    def _text(self, field: str) -> str:
        column, value = self.column(field), self._row.value
        found = value.get(column)
        if not isinstance(found, str):
            what = "is missing" if column not in value else f"is {type(found).__name__}, not text"
            raise self.error(f"{column!r} {what}; the record has the keys {keys_of(value)}")
        if problem := half_character(found):
            raise self.error(f"{column!r} {problem}")
        return found

    def items(self, field: str, expected: str) -> list[Any] | None:
        """A list that is not empty, or JSON text of one, as a cell of a csv file holds it."""
        found = self.get(field)
        if isinstance(found, str):
            found = self._from_json(self.column(field), found, expected)
        if found is None or found == []:
            return None
        if not isinstance(found, list):
            raise self.error(f"{self.column(field)!r} must be {expected}, this is {type(found).__name__}")
        return found

    def _from_json(self, column: str, text: str, expected: str) -> Any:
        try:
            return parse_json(text)
        except (ValueError, RecursionError) as error:
            raise self.error(
                f"{column!r} must be {expected}, or JSON text of it; this is text that is not JSON ({error})"
            ) from error

    def objects(self, name: str, found: Any) -> list[dict[str, Any]]:
        """A list of objects that JSON can hold, or JSON text of one: tools, tool calls."""
        if isinstance(found, str):
            found = self._from_json(name, found, "a list of objects")
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise self.error(f"{name!r} must be a list of objects, this is {_shape(found)}")
        if problem := problem_of(found):
            raise self.error(f"{name!r} {problem}")
        return found


def _shape(value: Any) -> str:
    if isinstance(value, list):
        return f"a list with {next(type(item).__name__ for item in value if not isinstance(item, dict))}"
    return type(value).__name__
