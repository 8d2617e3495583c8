"""A record: what there is to learn from, normalised, with the place that it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import xxhash

from data_shards import signed_json
from data_shards.errors import DataError


@dataclass(frozen=True)
class Record:
    """A conversation or a plain text."""

    path: str
    line: int
    """counts from 1: the line of a text file on which it begins, the row of a table"""
    messages: tuple[dict[str, Any], ...] = ()
    """turns with role and content (always text), and where given tool_calls, tool_call_id, name, reasoning_content,
    thinking; ``weight`` 0 or 1 on an assistant's turn says whether it is trained"""
    text: str | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    """function schemas, for the template"""
    source: str = ""

    def error(self, problem: str) -> DataError:
        return DataError.at(self.path, self.line, problem)

    def digest(self) -> bytes:
        """16 bytes (xxh3-128) of the content: equal content, equal digest, whatever file it came from."""
        return xxhash.xxh3_128(signed_json.canonical([list(self.messages), self.text, self.tools])).digest()

    def split_position(self) -> float:
        """In [0, 1), from the content alone: where a fractional split puts this record, whatever is around it.

        Which turns are trained does not move it: the same conversation stays on one side.
        """
        turns = [{key: value for key, value in turn.items() if key != "weight"} for turn in self.messages]
        content = [turns, self.text] if self.tools is None else [turns, self.text, self.tools]
        return xxhash.xxh3_64(signed_json.canonical(content)).intdigest() / 2**64
