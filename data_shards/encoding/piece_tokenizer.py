"""Texts to token ids piece by piece, each piece tokenised once: languages with spaces repeat their words.

A byte-level BPE sees a text through a regular expression that cuts it into words, and tokenises each word alone. None
of the expressions known here lets a word go on over a space: one that is not at a word's beginning is among white space
only. So a text may be cut before every space that has something else on one side of it, and the ids of the pieces are
those of the text. What lies between two such cuts is left to the tokenizer, and remembered. tokenizers 1.0 is to
remember words by itself; then this has done its duty.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from data_shards.encoding.tokenizer_parts import parts_of

_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS, _SIGNS_OR_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*", r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"


def _cased(behind: str) -> str:
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    return f"{_BEFORE}{upper}*{lower}+{behind}|{_BEFORE}{upper}+{lower}*{behind}"


_KNOWN = {
    # Llama 3, and others that came from cl100k
    _CONTRACTIONS + "|" + _BEFORE + r"\p{L}+|\p{N}{1,3}" + _SIGNS + _BLANKS,
    # Qwen 2 to 3
    _CONTRACTIONS + "|" + _BEFORE + r"\p{L}+|\p{N}" + _SIGNS + _BLANKS,
    # o200k: gpt-oss, Llama 4
    _cased(_CONTRACTIONS + "?") + r"|\p{N}{1,3}" + _SIGNS_OR_SLASHES + _BLANKS,
    # Tekken: Mistral NeMo and later
    _cased("") + r"|\p{N}" + _SIGNS_OR_SLASHES + _BLANKS,
}
"""Expressions of a ``Split``; that of GPT-2 is ``ByteLevel``'s own."""

_AMONG_BLANKS = re.compile(r"\s \s")
_CUT = re.compile(r"(?<=\S) | (?=\S)")
_MARK = "\0"
_MOST_PIECES, _LONGEST_PIECE = 1 << 17, 64
"""That are remembered: some 30 MB."""


class PieceTokenizer:
    """Remembers the ids of pieces of text. Pickled, it is sent without them."""

    def __init__(self, added: dict[str, int]) -> None:
        """``added``: the tokens that are found in a text before anything else, at least one."""
        self._added = added
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split
        self._separator = next((token for token in added if _stands_apart(token, added)), None)
        self._forget()

    def _forget(self) -> None:
        self._ids = {"": b""} | {text: np.int32(number).tobytes() for text, number in self._added.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return PieceTokenizer, (self._added,)

    @classmethod
    def of(cls, backend: Any) -> PieceTokenizer | None:
        """Of a ``tokenizers.Tokenizer``; None where texts may not be cut at their spaces, for all that is known."""
        model, added = backend.model, backend.get_added_tokens_decoder()
        if (
            type(model).__name__ != "BPE"
            or model.dropout
            or [each["type"] for each in parts_of(backend.normalizer)] not in ([], ["NFC"])
            or not _cuts_words(parts_of(backend.pre_tokenizer))
            or not added
            or any(token.lstrip or token.rstrip or token.single_word or token.normalized for token in added.values())
            or not all(map(_keeps_the_text, parts_of(backend.post_processor)))
        ):
            return None
        return cls({token.content: number for number, token in added.items()})

    def encode(self, backend: Any, texts: Iterable[str]) -> list[np.ndarray]:
        """Ids int32 ``[T]`` of each text, as ``backend`` gives them without the special tokens it adds by itself."""
        pieces = [self._pieces(text) for text in texts]
        missing = set().union(*pieces) - self._ids.keys()
        self._ids |= self._encode(backend, missing)
        found = [np.frombuffer(b"".join(map(self._ids.__getitem__, each)), np.int32) for each in pieces]
        for piece in missing:
            if len(piece) > _LONGEST_PIECE:
                del self._ids[piece]
        if len(self._ids) > _MOST_PIECES:
            self._forget()
        return found

    def _pieces(self, text: str) -> list[str]:
        if _MARK in text:
            return [text]
        found: list[str] = []
        for index, part in enumerate(self._split(text)):
            if index % 2:
                found.append(part)  # an added token, whatever is in it
                continue
            has_runs = part[:2].isspace() or part[-2:].isspace() or _AMONG_BLANKS.search(part)
            marked = _CUT.sub(f"{_MARK} ", part) if has_runs else part.replace(" ", f"{_MARK} ")
            found += marked.split(_MARK)
        return found

    def _encode(self, backend: Any, pieces: Iterable[str]) -> dict[str, bytes]:
        """Most as one text with an added token between them: each by itself takes several times as long."""
        joinable = [piece for piece in pieces if _MARK not in piece] if self._separator else []
        found = dict(zip(joinable, self._joined(backend, joinable), strict=True)) if joinable else {}
        alone = [piece for piece in pieces if piece not in found]
        for piece, encoding in zip(alone, backend.encode_batch_fast(alone, add_special_tokens=False), strict=True):
            found[piece] = np.array(encoding.ids, np.int32).tobytes()
        return found

    def _joined(self, backend: Any, pieces: list[str]) -> Iterator[bytes]:
        assert self._separator is not None
        (joined,) = backend.encode_batch_fast([self._separator.join(pieces)], add_special_tokens=False)
        ids = np.array(joined.ids, np.int32)
        ends = np.append(np.flatnonzero(ids == self._added[self._separator]), len(ids))
        starts = np.append(0, ends[:-1] + 1)
        data = ids.tobytes()
        return (data[4 * first : 4 * last] for first, last in zip(starts.tolist(), ends.tolist(), strict=True))


def _stands_apart(token: str, added: Iterable[str]) -> bool:
    """Between any two texts that hold no added token, this one is found and no other: none holds it, and none can begin
    before it and end in it, or begin in it and end behind it; not even itself."""

    def overlaps(first: str, second: str) -> bool:
        """Whether ``second`` can begin within ``first`` and end behind it."""
        return any(second.startswith(first[-size:]) for size in range(1, min(len(first), len(second))))

    return not any(
        overlaps(other, token) or overlaps(token, other) or (token in other and other != token) for other in added
    )


def _keeps_the_text(step: dict[str, Any]) -> bool:
    """A post-processor that at most adds tokens around the text's own."""
    if step["type"] == "TemplateProcessing":
        return sum("Sequence" in part for part in step["single"]) == 1
    return bool(step["type"] == "ByteLevel")


def _cuts_words(steps: list[dict[str, Any]]) -> bool:
    *splits, bytes_of = steps or [{"type": None}]
    if bytes_of["type"] != "ByteLevel" or bytes_of["add_prefix_space"]:
        return False
    if not splits:
        return bool(bytes_of["use_regex"])
    (split, *more) = splits
    return (
        not more
        and not bytes_of["use_regex"]
        and split["type"] == "Split"
        and split["pattern"].get("Regex") in _KNOWN
        and (split["behavior"], split["invert"]) == ("Isolated", False)
    )
