"""The audit as one HTML page that needs nothing but itself.

What records hold is foreign: the template escapes everything (autoescape), spells out what a browser would hide, obey
or reorder (``visible``, through ``finalize``, so that no expression can forget it), and forbids scripts by its content
security policy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from data_shards.audit.part import Sample
from data_shards.audit.report import Report, at, percent, summary
from data_shards.audit.text import visible

_TEMPLATE = "page.html.jinja"
_BLANKS = re.compile(r"([ \t\n])")


class Token(NamedTuple):
    """One token as it is shown."""

    parts: tuple[tuple[str, str], ...]
    """(text, space | tab | newline | text)"""
    classes: str
    """of CSS: ``t`` trained, ``s`` special, ``p`` part of a character that a later token ends"""
    title: str


class Preview(NamedTuple):
    where: str
    split: str
    source: str
    num_tokens: int
    num_trained: int
    pieces: tuple[tuple[int, tuple[Token, ...]], ...]
    """(tokens left out before, tokens)"""
    left_out: int
    """tokens after the last piece"""


def previews_of(samples: Iterable[Sample], tokenizer: Any) -> list[Preview]:
    """``tokenizer``: a fast one of transformers."""
    return [_preview(sample, tokenizer) for sample in samples]


def _preview(sample: Sample, tokenizer: Any) -> Preview:
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    pieces, position = [], 0
    for start, ids, trained in sample.pieces:
        texts = token_texts(ids.tolist(), tokenizer.backend_tokenizer)
        tokens = tuple(
            _token(index, number, text, learnt, number in special)
            for index, (number, text, learnt) in enumerate(
                zip(ids.tolist(), texts, trained.tolist(), strict=True), start
            )
        )
        pieces.append((start - position, tokens))
        position = start + len(ids)
    where = f"{sample.where.path}:{sample.where.line}"
    return Preview(
        where,
        sample.where.split,
        sample.source,
        sample.num_tokens,
        sample.num_trained,
        tuple(pieces),
        sample.num_tokens - position,
    )


def token_texts(ids: list[int], backend: Any) -> list[str | None]:
    """What each token adds to the text; None where it only begins a character that a later one completes."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    texts = [stream.step(backend, number) for number in ids]
    return [text if text != "" else None for text in texts]


def _token(index: int, number: int, text: str | None, trained: bool, special: bool) -> Token:
    learnt = trained and index > 0  # Nothing comes before the first, so it is never predicted.
    classes = " ".join(name for name, wanted in (("t", learnt), ("s", special), ("p", text is None)) if wanted)
    title = f"token {index}, id {number}{', trained' if learnt else ''}"
    kinds = {" ": "space", "\t": "tab", "\n": "newline"}
    parts = tuple((part, kinds.get(part, "text")) for part in _BLANKS.split(text or "") if part)
    return Token(parts, classes, title)


class Bar(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    label: str


class Histogram(NamedTuple):
    """Drawn in a box of 600 × 150 units, lengths on a logarithmic scale."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    limit: float | None
    """where ``seq_len`` lies, if it lies within"""


_WIDTH, _HEIGHT, _BARS_PER_OCTAVE = 600.0, 150.0, 4


def histogram_of(pairs: list[list[int]], seq_len: int) -> Histogram:
    """``pairs``: (smallest length of a bin, records), as the report has them."""
    if not pairs:
        return Histogram((), (), None)
    counts: dict[int, int] = {}
    for length, count in pairs:
        place = math.floor(math.log2(length) * _BARS_PER_OCTAVE + 1e-9)
        counts[place] = counts.get(place, 0) + count
    low = min(counts) // _BARS_PER_OCTAVE * _BARS_PER_OCTAVE
    high = (max(counts) // _BARS_PER_OCTAVE + 1) * _BARS_PER_OCTAVE
    step, largest = _WIDTH / (high - low), max(counts.values())
    bars = []
    for place, count in sorted(counts.items()):
        height = max(_HEIGHT * count / largest, 1.5)
        first, last = (math.ceil(2 ** (edge / _BARS_PER_OCTAVE) - 1e-9) for edge in (place, place + 1))
        label = f"{first:,}–{max(first, last - 1):,} tokens: {count:,} records"
        bars.append(Bar((place - low) * step + 0.5, _HEIGHT - height, max(step - 1, 0.5), height, label))
    ticks = tuple(
        ((place - low) * step, f"{2 ** (place // _BARS_PER_OCTAVE):,}")
        for place in range(low, high + 1, _BARS_PER_OCTAVE * (1 + (high - low) // (_BARS_PER_OCTAVE * 8)))
    )
    limit = (math.log2(seq_len) * _BARS_PER_OCTAVE - low) * step
    return Histogram(tuple(bars), ticks, limit if 0 <= limit <= _WIDTH else None)


def page(report: Report, previews: list[Preview]) -> bytes:
    """The whole page, UTF-8."""
    histograms = {
        name: histogram_of(figures["lengths"], report["seq_len"])
        for name, figures in report["splits"].items()
        if figures["lengths"]
    }
    text = _template().render(
        report=report, summary=summary(report), histograms=histograms, previews=previews, at=at, percent=percent
    )
    return text.encode(errors="replace")


def _finalize(value: Any) -> Any:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE)
