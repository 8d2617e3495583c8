"""One pass over the turns of a batch of records (pure): texts, roles, hashes, and turns that look wrong.

It runs for every record of a corpus, so it is one loop rather than several readable ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import xxhash

from data_shards import signed_json
from data_shards.audit.kind import Kind
from data_shards.audit.text import scan, special_token_pattern, visible
from data_shards.sources.records import Record

Note = tuple[int, Kind, str]
"""Index of a record in its batch, what is the matter, and a detail"""

_SIMPLE = {"role", "content"}
_THOUGHTS = ("reasoning_content", "thinking")


class Hashes(NamedTuple):
    """64 bits each (xxh3); 0 where the record has no such part. Which turns are trained makes no difference."""

    record: int
    prompt: int
    """of all that comes before the last assistant turn, blanks around each text left out"""
    answer: int
    """of that turn"""


@dataclass(frozen=True)
class Turns:
    """What the records of a batch hold, in their order."""

    texts: list[str] = field(default_factory=list)
    """all that a person or a model wrote"""
    owners: list[tuple[int, int, str]] = field(default_factory=list)
    """of each text: its record, the turn (-1: none) and the field that holds it"""
    notes: list[Note] = field(default_factory=list)
    hashes: list[Hashes] = field(default_factory=list)
    messages: dict[str, Counter[str]] = field(default_factory=dict)
    """by source and role; plain text counts as the role ``text``"""
    characters: dict[str, Counter[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[Record]) -> Turns:
        turns = cls()
        for index, record in enumerate(records):
            source = getattr(record, "source", "")
            if source not in turns.messages:
                turns.messages[source], turns.characters[source] = Counter(), Counter()
            if record.text is not None:
                turns._add_text(index, record, source)
            else:
                turns._add_conversation(index, record, source)
        return turns

    def _add_text(self, index: int, record: Record, source: str) -> None:
        text = record.text or ""
        self.texts.append(text)
        self.owners.append((index, -1, "text"))
        self.messages[source]["text"] += 1
        self.characters[source]["text"] += len(text)
        self.hashes.append(Hashes(xxhash.xxh3_64_intdigest(text.strip().encode()), 0, 0))

    def _add_conversation(self, index: int, record: Record, source: str) -> None:
        messages, characters = self.messages[source], self.characters[source]
        last_role, parts, answer = None, [], 0
        for number, turn in enumerate(record.messages):
            role, content = turn["role"], turn.get("content") or ""
            messages[role] += 1
            characters[role] += len(content)
            self.texts.append(content)
            self.owners.append((index, number, "content"))
            if turn.keys() == _SIMPLE:
                parts.append(f"{role}\0{content.strip()}".encode())
            else:
                parts.append(self._add_fields(index, number, turn))
            if not content or content.isspace():
                if not turn.get("tool_calls"):
                    self.notes.append((index, Kind.EMPTY_TURN, f"messages[{number}], {role}"))
            elif role == last_role and role in ("user", "assistant"):
                detail = f"messages[{number - 1}] and messages[{number}], {role}"
                self.notes.append((index, Kind.REPEATED_ROLE, detail))
            if role == "assistant":
                answer = number
            last_role = role
        self._note_end(index, record)
        self._add_hashes(record, parts, answer)

    def _add_fields(self, index: int, number: int, turn: dict[str, Any]) -> bytes:
        for name in _THOUGHTS:
            if isinstance(turn.get(name), str):
                self.texts.append(turn[name])
                self.owners.append((index, number, name))
        plain = {key: value for key, value in turn.items() if key != "weight"}
        content = turn.get("content") or ""
        if plain.keys() == _SIMPLE:
            return f"{turn['role']}\0{content.strip()}".encode()
        return signed_json.canonical(plain | {"content": content.strip()})

    def _note_end(self, index: int, record: Record) -> None:
        *before, last = record.messages
        if last["role"] != "assistant":
            detail = f"ends with messages[{len(before)}], {last['role']}"
            self.notes.append((index, Kind.UNANSWERED, detail))
        elif before and last.get("content") and last["content"] == before[-1].get("content"):
            self.notes.append((index, Kind.ECHO, excerpt(last["content"])))

    def _add_hashes(self, record: Record, parts: list[bytes], answer: int) -> None:
        """``parts``: bytes of each turn; ``answer``: index of the last assistant turn, 0 where it has no prompt."""
        tools = getattr(record, "tools", None)
        head = signed_json.canonical(tools) + b"\1" if tools else b""
        prompt = head + b"\1".join(parts[:answer])
        whole = xxhash.xxh3_64_intdigest(head + b"\1".join(parts))
        if answer:
            self.hashes.append(Hashes(whole, xxhash.xxh3_64_intdigest(prompt), xxhash.xxh3_64_intdigest(parts[answer])))
        else:
            self.hashes.append(Hashes(whole, 0, 0))

    def text_notes(self, special_tokens: tuple[str, ...]) -> Iterator[Note]:
        for found in scan(self.texts, special_token_pattern(special_tokens)):
            index, number, key = self.owners[found.text]
            name = key if number < 0 else f"messages[{number}].{key}"
            what = repr(found.match) if found.kind == Kind.SPECIAL_TOKEN else _code_points(found.match)
            near = excerpt(self.texts[found.text][max(0, found.start - 12) : found.start + 24])
            yield index, found.kind, f"{what} at character {found.start} of {name}: {near}"


def excerpt(text: str, length: int = 36) -> str:
    """The beginning of a text on one line, safe for a terminal."""
    shown = visible(text[:length])
    return shown + "…" if len(text) > length else shown


def _code_points(text: str) -> str:
    return " ".join(f"U+{ord(character):04X}" for character in text)
