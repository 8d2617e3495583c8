"""Figures about records on their way into shards: made batch by batch in any process, merged in order.

What is kept does not grow with the corpus, but for 36 bytes a record (``table.py``, which can keep them in a
file). Merging is associative: however the records are cut into parts, the merged audit is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data_shards.audit.batch import Batch, TokenizerFacts, by_source
from data_shards.audit.config import AuditConfig
from data_shards.audit.figures import Figures, RoleFigures, TokenCounts
from data_shards.audit.histogram import histogram
from data_shards.audit.kind import Kind
from data_shards.audit.table import ROW, Place, Table, Where, join
from data_shards.audit.text import visible
from data_shards.audit.turns import Hashes
from data_shards.encoding.encoder import Encoded
from data_shards.sources.records import Record


@dataclass(frozen=True)
class AuditLimits:
    """What decides over a record's fate, and how much is kept to show."""

    seq_len: int
    too_long: str
    """``data.too_long``: all but ``truncate`` split plain text and drop conversations (``encoding/too_long.py``)"""
    config: AuditConfig = field(default_factory=AuditConfig)
    removes_duplicates: bool = False
    """repeats within a split are left out later (``data.cleaning.deduplicate``)"""

    def outcome(self, record: Record) -> Kind:
        """What becomes of this record where it is longer than ``seq_len``."""
        if self.too_long == "truncate":
            return Kind.TRUNCATED
        return Kind.TOO_LONG if record.text is None else Kind.SPLIT


class Dropped(NamedTuple):
    """A record that could not be encoded, or was not wanted, where the policy is to go on without it."""

    path: str
    line: int
    kind: Kind
    """one of ``kind.DROPPED``"""
    problem: str
    source: str = ""


class Example(NamedTuple):
    where: Where
    detail: str
    other: Where | None = None
    """the record that it goes with, as a duplicate with its first"""


class Sample(NamedTuple):
    """A record to be shown token by token: pieces of it, each with the index of its first token."""

    key: int
    where: Where
    source: str
    num_tokens: int
    num_trained: int
    pieces: tuple[tuple[int, np.ndarray, np.ndarray], ...]
    """(first token, ids int32 ``[t]``, trained bool ``[t]``)"""


class Long(NamedTuple):
    negative_length: int
    where: Where


@dataclass(frozen=True)
class AuditPart:
    """The audit of some records; picklable."""

    figures: dict[tuple[str, str], Figures]
    """by (split, source)"""
    examples: dict[tuple[Kind, str], tuple[Example, ...]]
    """the first ones by (kind, split)"""
    tokens: TokenCounts
    table: Table
    samples: tuple[Sample, ...]
    """those of smallest hash, so chosen at random and always the same"""
    longest: tuple[Long, ...]
    limits: AuditLimits

    @classmethod
    def of(
        cls, encoded: Iterable[Encoded | Dropped], split: str, facts: TokenizerFacts, limits: AuditLimits
    ) -> AuditPart:
        """Of records of one split, as the encoder gave them, before anything is cut or dropped for its length."""
        items = list(encoded)
        dropped = [item for item in items if isinstance(item, Dropped)]
        batch = Batch([item for item in items if not isinstance(item, Dropped)], facts)
        notes = _notes_of(batch, limits)
        hashes = batch.turns.hashes
        sources = by_source(batch.records)
        figures = {(split, source): _figures_of(batch, source, chosen, notes) for source, chosen in sources.items()}
        for item in dropped:
            key = (split, item.source)
            figures[key] = figures.get(key, Figures()) + Figures(records=1, kinds={item.kind: 1})
        return cls(
            figures,
            _examples_of(batch, notes, dropped, split, limits.config.num_examples),
            TokenCounts.of(batch.ids),
            _table_of(batch.records, hashes, split),
            _samples_of(batch, hashes, split, limits.config),
            _longest_of(batch, split, limits.config.num_examples),
            limits,
        )


def merge(first: AuditPart, second: AuditPart) -> AuditPart:
    """The audit of the records of ``first`` followed by those of ``second``."""
    config = first.limits.config
    examples = {
        key: (*first.examples.get(key, ()), *second.examples.get(key, ()))[: config.num_examples]
        for key in first.examples | second.examples
    }
    figures = dict(first.figures)
    for key, found in second.figures.items():
        figures[key] = figures.get(key, Figures()) + found
    return AuditPart(
        figures,
        examples,
        first.tokens.merged(second.tokens),
        join(first.table, second.table),
        _smallest(first.samples + second.samples, config.num_previews),
        tuple(sorted(first.longest + second.longest, key=lambda item: item.negative_length))[: config.num_examples],
        first.limits,
    )


def _notes_of(batch: Batch, limits: AuditLimits) -> dict[Kind, dict[int, str]]:
    """By kind, the records that stand out, in order, each with its first detail."""
    notes: dict[Kind, dict[int, str]] = {}
    for index in np.flatnonzero((batch.lengths > limits.seq_len) & (batch.targets > 0)).tolist():
        detail = f"{batch.lengths[index]:,} tokens"
        notes.setdefault(limits.outcome(batch.records[index]), {})[index] = detail
    for index, kind, detail in batch.notes(limits.config.min_trained_tokens):
        notes.setdefault(kind, {}).setdefault(index, detail)
    return notes


def _figures_of(batch: Batch, source: str, chosen: list[int], notes: dict[Kind, dict[int, str]]) -> Figures:
    everything = np.array(chosen, np.int64)
    gone = notes.get(Kind.TOO_LONG, {}).keys() | notes.get(Kind.TRAINS_ON_NOTHING, {}).keys()
    kept = np.array([index for index in chosen if index not in gone], np.int64) if gone else everything
    answers = int(batch.answers[kept].sum())
    members = set(chosen) if len(chosen) < len(batch.records) else None
    kinds = {kind: len(found) if members is None else len(found.keys() & members) for kind, found in notes.items()}
    return Figures(
        records=len(chosen),
        tokens=int(batch.lengths[kept].sum()),
        trained_tokens=int(batch.targets[kept].sum()),
        unknown_tokens=int(batch.unknown[kept].sum()),
        answers=answers,
        answers_with_stop=answers - int(batch.answers_without_stop[kept].sum()),
        longest=int(batch.lengths[everything].max(initial=0)),
        lengths=histogram(batch.lengths[everything]),
        trained_lengths=histogram(batch.targets[kept]),
        roles={
            role: RoleFigures(number, batch.turns.characters[source][role])
            for role, number in sorted(batch.turns.messages[source].items())
        },
        kinds=dict(+Counter(kinds)),
    )


def _where(record: Record, split: str) -> Where:
    return Where(split, record.path, record.line)


def _examples_of(
    batch: Batch, notes: dict[Kind, dict[int, str]], dropped: list[Dropped], split: str, limit: int
) -> dict[tuple[Kind, str], tuple[Example, ...]]:
    examples: dict[tuple[Kind, str], tuple[Example, ...]] = {}
    for kind, found in notes.items():
        chosen = list(found.items())[:limit]
        examples[kind, split] = tuple(Example(_where(batch.records[i], split), detail) for i, detail in chosen)
    for item in dropped:
        seen = examples.get((item.kind, split), ())
        if len(seen) < limit:
            where = Where(split, item.path, item.line)
            example = Example(where, visible(item.problem.removeprefix(f"{where}: ")))
            examples[item.kind, split] = (*seen, example)
    return examples


def _table_of(records: list[Record], hashes: list[Hashes], split: str) -> Table:
    if not records:
        return Table()
    places = {place: number for number, place in enumerate(dict.fromkeys(Place(split, r.path) for r in records))}
    rows = np.empty(len(records), ROW)
    for name, column in zip(Hashes._fields, zip(*hashes, strict=True), strict=True):
        rows[name] = column
    rows["line"] = [record.line for record in records]
    rows["place"] = [places[Place(split, record.path)] for record in records]
    return Table(tuple(places), (rows,))


def _longest_of(batch: Batch, split: str, limit: int) -> tuple[Long, ...]:
    order = np.argsort(-batch.lengths, kind="stable")[:limit].tolist()
    return tuple(Long(-int(batch.lengths[i]), _where(batch.records[i], split)) for i in order)


def _smallest(samples: tuple[Sample, ...], limit: int) -> tuple[Sample, ...]:
    """The first of each of the smallest keys: of equal records, one is shown."""
    firsts: dict[int, Sample] = {}
    for sample in samples:
        firsts.setdefault(sample.key, sample)
    return tuple(firsts[key] for key in sorted(firsts)[:limit])


def _samples_of(batch: Batch, hashes: list[Hashes], split: str, config: AuditConfig) -> tuple[Sample, ...]:
    order = sorted(range(len(hashes)), key=lambda index: hashes[index].record)
    firsts = list({hashes[index].record: index for index in reversed(order)}.values())[::-1]
    return tuple(_sample(batch, index, hashes[index].record, split, config) for index in firsts[: config.num_previews])


def _sample(batch: Batch, index: int, key: int, split: str, config: AuditConfig) -> Sample:
    tokens = slice(batch.starts[index], batch.stops[index])
    ids, trained = batch.ids[tokens], batch.trained[tokens]
    pieces = tuple(
        (start, ids[start:stop].copy(), trained[start:stop].copy())
        for start, stop in preview_windows(trained, config.preview_tokens)
    )
    record = batch.records[index]
    source = getattr(record, "source", "")
    return Sample(key, _where(record, split), source, len(ids), int(batch.targets[index]), pieces)


def preview_windows(trained: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Which tokens to show, ``limit`` in all: the beginning, and where training starts if that is far away."""
    first = int(np.argmax(trained)) if trained.any() else 0
    if len(trained) <= limit or first < limit * 3 // 4:
        return [(0, min(limit, len(trained)))]
    head, lead = limit // 4, limit // 8
    start = min(max(head, first - lead), len(trained) - (limit - head))
    return [(0, head), (start, start + limit - head)]
