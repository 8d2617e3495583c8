"""The pieces that an audit is made of: characters, repeats, histograms."""

from __future__ import annotations

import re
import tracemalloc
from collections import Counter, defaultdict
from functools import reduce
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.audit import table as tables
from data_shards.audit.histogram import EDGES, histogram, quantile
from data_shards.audit.kind import Kind
from data_shards.audit.part import preview_windows
from data_shards.audit.text import scan, special_token_pattern, visible

TEXTS: dict[str, Kind | None] = {
    "tab\tand line end\r\n": None,
    "bell \x07": Kind.CONTROL,
    "delete \x7f": Kind.CONTROL,
    "next line \x85": Kind.CONTROL,
    "lost \ufffd": Kind.REPLACEMENT,
    "cafÃ©": Kind.MOJIBAKE,
    "20 Â°C": Kind.MOJIBAKE,
    "itâ€™s": Kind.MOJIBAKE,
    "ðŸ˜€": Kind.MOJIBAKE,
    "“IRMÃ”, NÃO, â, ð, Âmbar": None,
    "zero\u200bwidth": Kind.INVISIBLE,
    "soft\u00adhyphen": Kind.INVISIBLE,
    "bidi \u2066x": Kind.INVISIBLE,
    "hidden \U000e0041\U000e0042": Kind.INVISIBLE,
    "👩🏽‍🚀 and می‌خواهم": None,
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f": None,
    "a < b and <|im_start|": None,
    "a <|im_end|> b": Kind.SPECIAL_TOKEN,
    "é <|im_end|> b": Kind.SPECIAL_TOKEN,
}


def test_unusual_characters() -> None:
    pattern = special_token_pattern(("<|im_end|>", "<|im_start|>"))
    texts = list(TEXTS)
    for batch in (texts, texts[::-1], *([text] for text in texts)):
        found = {batch[item.text]: item for item in scan(batch, pattern)}
        assert {text: item.kind for text, item in found.items()} == {t: TEXTS[t] for t in batch if TEXTS[t]}
        assert all(text[item.start :].startswith(item.match) for text, item in found.items())


@given(st.lists(st.text(alphabet="ab\n\x00Ãé©\ufffd\u200b<>"), max_size=6))
def test_scanning_together_finds_what_scanning_alone_does(texts: list[str]) -> None:
    pattern = special_token_pattern(("<>", "<"))
    alone = [item._replace(text=n) for n, text in enumerate(texts) for item in scan([text], pattern)]
    assert sorted(alone) == sorted(scan(texts, pattern))


@given(st.text())
def test_visible_text_holds_nothing_hidden(text: str) -> None:
    shown = visible(text + "\x00\x1b[31m\u202e\n")
    assert shown.endswith("␀␛[31m⟨U+202E⟩␊") and not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", shown)


HASH = st.sampled_from([0, 1, 2, 2**60, 2**64 - 1])


@given(st.lists(st.tuples(st.sampled_from("abc"), HASH.filter(bool), HASH, HASH), max_size=30), st.integers(1, 30))
def test_repeats_are_those_that_are_counted_one_by_one(rows: list[tuple[str, int, int, int]], cut: int) -> None:
    rows.sort(key=lambda row: row[0])  # Splits come one after the other.
    table = reduce(tables.join, (_table(rows[n : n + cut], n) for n in range(0, len(rows), cut)), tables.Table())
    with tables.SpooledTable() as spooled:
        for n in range(0, len(rows), cut):
            spooled.add(_table(rows[n : n + cut], n))
        check_repeats(spooled.whole(), rows)
    check_repeats(table, rows)


def check_repeats(table: tables.Table, rows: list[tuple[str, int, int, int]]) -> None:
    assert len(table) == len(rows)
    firsts: dict[Any, tuple[str, int, int, int]] = {}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        split, own, prompt, answer = row
        counts["duplicates"][split] += (split, own) in firsts
        firsts.setdefault((split, own), row)
        counts["leaks"][split] += firsts.setdefault(own, row)[0] < split
        if prompt:
            first = firsts.setdefault(("prompt", prompt), row)
            counts["prompt_leaks"][split] += first[0] < split and first[1] != own
            counts["conflicts"][split] += firsts.setdefault((split, "prompt", prompt), row)[3] != answer
    for name in ("duplicates", "leaks", "prompt_leaks", "conflicts"):
        repeats = getattr(tables, name)(table, 100)
        assert repeats.counts == dict(+counts[name]), name
        assert len(repeats.examples) == counts[name].total()
        for where, other in repeats.examples:
            assert rows[where.line - 1][0] == where.split and other.line < where.line
    often = Counter(answer for *_, answer in rows if answer)
    _, sizes = tables.repeated_answers(table, 2, 100)
    assert sorted(sizes) == sorted(count for count in often.values() if count > 2)


def _table(rows: list[tuple[str, int, int, int]], first: int) -> tables.Table:
    splits = sorted({row[0] for row in rows}, key=[row[0] for row in rows].index)
    array = np.array(
        [(own, prompt, answer, first + n, splits.index(s)) for n, (s, own, prompt, answer) in enumerate(rows, 1)],
        tables.ROW,
    )
    return tables.Table(tuple(tables.Place(split, "x.jsonl") for split in splits), (array,))


@pytest.mark.parametrize("distinct", [2**63, 50_000], ids=["all differ", "all repeat"])
def test_memory_of_a_million_records(distinct: int) -> None:
    """Under 32 MB while a table of half a million rows grows in a file and is searched, times two."""
    num, step = 500_000, 5_000
    rng = np.random.default_rng(0)
    tracemalloc.start()
    with tables.SpooledTable() as spooled:
        for start in range(0, num, step):
            rows = np.zeros(step, tables.ROW)
            for name in ("record", "prompt", "answer"):
                rows[name] = rng.integers(1, distinct, step, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            rows["line"] = np.arange(start, start + step)
            spooled.add(tables.Table((tables.Place("train", "x.jsonl"),), (rows,)))
        table = spooled.whole()
        found = [look(table, 5).counts for look in (tables.duplicates, tables.leaks, tables.conflicts)]
        length = len(table)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == num and peak * (1_000_000 / num) < 32e6, f"{peak * 2 / 1e6:.1f} MB per million records"
    assert bool(found[0]) == (distinct == 50_000)


@given(st.lists(st.integers(0, 100_000), min_size=1, max_size=200), st.floats(0.01, 1))
def test_quantiles_are_right_to_a_bin(lengths: list[int], share: float) -> None:
    counts = histogram(np.array(lengths))
    exact = int(np.quantile(np.maximum(lengths, 1), share, method="inverted_cdf"))
    place = int(np.searchsorted(EDGES, exact, side="right"))
    assert counts.sum() == len(lengths) and exact <= quantile(counts, share) < EDGES[place]


@given(st.lists(st.booleans(), max_size=300), st.integers(16, 64))
def test_previews_show_where_training_starts(mask: list[bool], limit: int) -> None:
    trained = np.array([False] * 40 + mask, bool)
    windows = preview_windows(trained, limit)
    shown = [n for start, stop in windows for n in range(start, stop)]
    assert len(shown) == len(set(shown)) == min(limit, len(trained)) and shown == sorted(shown)
    assert not trained.any() or int(np.argmax(trained)) in shown
