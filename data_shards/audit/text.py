"""Characters that seldom belong into training text, found in many texts at once (pure).

One pass over all texts of a batch decides whether there is anything to look for; only then each kind gets its own.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from data_shards.audit.kind import Kind

# Zero-width space, word joiner, BOM inside the text, soft hyphen, and what reorders text (Unicode TR 36). Joiners
# (U+200C, U+200D) and plain direction marks belong to many scripts and to emoji. Tag characters carry hidden text
# except behind the black flag, where they spell a region.
_INVISIBLE = (
    r"[\u200b\u2060\ufeff\u00ad\u202a-\u202e\u2066-\u2069\U000e0001]"
    r"|(?<![\U0001f3f4\U000e0020-\U000e007f])[\U000e0020-\U000e007e]"
)
# UTF-8 read as Latin-1 or Windows-1252: é as Ã©, ° as Â°, ’ as â€™, 😀 as ðŸ˜€. A capital Ã before a closing quote or
# dash is Portuguese.
_MOJIBAKE = r"[ÃÂ][\u0080-\u009f\u00a1-\u00ba\u00bc-\u00be]|â€|ðŸ"
_PATTERNS = {
    Kind.CONTROL: re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]"),
    Kind.REPLACEMENT: re.compile("\ufffd"),
    Kind.MOJIBAKE: re.compile(_MOJIBAKE),
    Kind.INVISIBLE: re.compile(_INVISIBLE),
}
_CONTROL_BYTES = bytes({*range(0x20), 0x7F} - {*b"\t\n\r"})
_ANY = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffdÃÂâð\u200b\u2060\ufeff\u00ad\u202a-\u202e\u2066-\u2069\U000e0001-\U000e007e]"
)


class Found(NamedTuple):
    """The first place of one kind in one text."""

    text: int
    """index of the text"""
    kind: Kind
    start: int
    """character within the text"""
    match: str


@lru_cache(maxsize=8)
def special_token_pattern(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """Any of these texts, the longest first; None where there are none."""
    wanted = sorted(filter(None, tokens), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, wanted))) if wanted else None


def scan(texts: Sequence[str], special_tokens: re.Pattern[str] | None) -> list[Found]:
    """The first find of each kind in each text, kind by kind, texts in order."""
    finds: list[Found] = []
    plain = [index for index, text in enumerate(texts) if text.isascii()]
    other = [index for index, text in enumerate(texts) if not text.isascii()]
    for chosen, kinds_in in ((plain, _kinds_in_ascii), (other, _kinds_in_unicode)):
        joined = "\n".join([texts[index] for index in chosen])
        starts = [0, *accumulate(len(texts[index]) + 1 for index in chosen)]
        patterns = {kind: _PATTERNS[kind] for kind in kinds_in(joined)}
        if special_tokens is not None:
            patterns[Kind.SPECIAL_TOKEN] = special_tokens
        for kind, pattern in patterns.items():
            finds += (found._replace(text=chosen[found.text]) for found in _finds(joined, starts, pattern, kind))
    return sorted(finds, key=lambda found: (found.kind, found.text))


def _kinds_in_ascii(joined: str) -> Iterable[Kind]:
    """Deleting bytes is five times as fast as a pattern."""
    data = joined.encode()
    return (Kind.CONTROL,) if len(data.translate(None, _CONTROL_BYTES)) < len(data) else ()


def _kinds_in_unicode(joined: str) -> Iterable[Kind]:
    return _PATTERNS if _ANY.search(joined) else ()


def _finds(joined: str, starts: list[int], pattern: re.Pattern[str], kind: Kind) -> Iterator[Found]:
    position = 0
    while match := pattern.search(joined, position):
        text = bisect_right(starts, match.start()) - 1
        yield Found(text, kind, match.start() - starts[text], match[0])
        position = starts[text + 1]


def visible(text: str) -> str:
    """The text with every character that a terminal or browser hides, obeys or reorders spelt out."""
    return _HIDDEN.sub(_spell, text)


_HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\ufffd\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0001-\U000e007f]"
)


def _spell(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return f"⟨U+{code:04X}⟩"
