"""What the figures of an audit mean: which trouble, how bad, how often, where, and what to do (pure)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from data_shards.audit.figures import Figures
from data_shards.audit.histogram import quantile
from data_shards.audit.kind import Kind
from data_shards.audit.part import AuditPart, Example
from data_shards.audit.table import Repeats, conflicts, duplicates, leaks, prompt_leaks, repeated_answers

OUTLIER_FACTOR = 8
"""A record this many times as long as 99% of the others is reported."""
_FEWEST_REPEATED = 20
_LOW_TRAINED_SHARE, _LOW_PACKED_SHARE = 0.01, 0.9


class Severity(StrEnum):
    """Error: the run, or what is measured on it, is most likely not what was meant. Note: good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Packing(NamedTuple):
    """Of one split, as it was written."""

    packs: int
    tokens: int
    seq_len: int

    @property
    def share(self) -> float:
        """Tokens among places; 1 where there are no packs."""
        return self.tokens / (self.packs * self.seq_len) if self.packs else 1.0


@dataclass(frozen=True)
class Finding:
    kind: Kind
    severity: Severity
    count: int
    """records, or what ``unit`` says"""
    share: float
    """of all of them"""
    splits: Mapping[str, int]
    """count by split"""
    meaning: str
    advice: str
    examples: tuple[Example, ...]
    unit: str = "records"


class _Text(NamedTuple):
    severity: Severity
    meaning: str
    advice: str


_E, _W, _N = Severity
_TEXTS: dict[Kind, _Text] = {
    Kind.UNREADABLE: _Text(_W, "could not be read and are left out", "Mend or remove these lines."),
    Kind.REFUSED: _Text(
        _W, "are refused by the chat template and left out", "Mend the records, or give a template that takes them."
    ),
    Kind.FILTERED: _Text(_N, "are left out by the cleaning that was asked for", "Nothing, if that was meant."),
    Kind.TRAINS_ON_NOTHING: _Text(
        _E,
        "train on nothing and are left out",
        "Look at data.train_on, at the weights of turns, and at what the template marks.",
    ),
    Kind.TOO_LONG: _Text(_W, "are longer than data.seq_len and dropped", "Raise data.seq_len, or see data.too_long."),
    Kind.TRUNCATED: _Text(
        _W, "are longer than data.seq_len and cut", "Raise data.seq_len; answers without an end teach not to stop."
    ),
    Kind.SPLIT: _Text(_N, "are plain text longer than data.seq_len, split into pieces", "Nothing; no token is lost."),
    Kind.ONLY_STOP_TOKEN: _Text(_E, "teach only to stop: the answer is empty", "Remove them or give them an answer."),
    Kind.SHORT_ANSWER: _Text(
        _W, "have fewer trained tokens than data.audit.min_trained_tokens", "Look whether their answers are whole."
    ),
    Kind.NO_STOP_TOKEN: _Text(
        _E,
        "have an answer that ends without a stop token, so the model may never stop",
        "Mend the template, or the tokenizer's eos_token.",
    ),
    Kind.TWO_BOS_TOKENS: _Text(
        _E, "begin with two bos tokens", "Take the bos out of the template, of the text, or of the tokenizer."
    ),
    Kind.UNKNOWN_TOKENS: _Text(_W, "hold characters that the tokenizer does not know", "Use the base's own tokenizer."),
    Kind.SPECIAL_TOKEN: _Text(
        _W,
        "have a special token in their text, which becomes the real token",
        "Remove or respell it, unless it is meant to be there.",
    ),
    Kind.CONTROL: _Text(_W, "hold control characters", "Clean the text where it comes from."),
    Kind.REPLACEMENT: _Text(_W, "hold U+FFFD: characters lost in decoding", "Read the original with its own encoding."),
    Kind.MOJIBAKE: _Text(
        _W, "look like UTF-8 that was read as Latin-1 (é as Ã©)", "Decode the original as UTF-8; ftfy mends most."
    ),
    Kind.INVISIBLE: _Text(
        _W, "hold invisible or reordering characters", "Remove them: the model would learn what nobody sees."
    ),
    Kind.EMPTY_TURN: _Text(_W, "have an empty turn", "Remove the turn, or fill it."),
    Kind.REPEATED_ROLE: _Text(_W, "have two turns of one role in a row", "Join them, or look for a lost turn."),
    Kind.UNANSWERED: _Text(
        _W, "do not end with the assistant, so their last turns train nothing", "Cut them, or look for a lost answer."
    ),
    Kind.ECHO: _Text(_W, "have an answer equal to the turn before it", "Look whether columns were mixed up."),
    Kind.OUTLIER: _Text(
        _N, f"are over {OUTLIER_FACTOR} times as long as 99% of all", "Look whether these are what they should be."
    ),
    Kind.DUPLICATE: _Text(_W, "repeat an earlier record of their split", "Remove them, or mean them: each counts."),
    Kind.REMOVED_DUPLICATE: _Text(
        _N, "repeat an earlier record of their split and are left out", "Nothing; data.cleaning asked for it."
    ),
    Kind.LEAK: _Text(
        _E,
        "are in an earlier split too, so evaluation measures memory",
        "Remove them from one split, or split by data.validation_fraction, which keeps equal records together.",
    ),
    Kind.PROMPT_LEAK: _Text(
        _W, "have the prompt of a record of an earlier split, with another answer", "Keep one prompt in one split."
    ),
    Kind.CONFLICT: _Text(
        _N, "answer a prompt otherwise than an earlier record", "Nothing, if several answers are meant."
    ),
    Kind.REPEATED_ANSWER: _Text(
        _N, "share an answer with very many others", "Look for templates and refusals; labels may look like this."
    ),
    Kind.EMPTY_SPLIT: _Text(_W, "hold no record to train on", "Check the paths, seq_len and the fraction."),
    Kind.LOW_TRAINED_SHARE: _Text(
        _W, "are trained: few among all", "Check data.train_on and the mask; prompts may be far longer than answers."
    ),
    Kind.LOOSE_PACKS: _Text(
        _W, "leave much of the packs empty", "Choose a data.seq_len that fits the records, or another packing."
    ),
}


def findings_of(audit: AuditPart, packing: Mapping[str, Packing]) -> tuple[Finding, ...]:
    """Worst first; equally bad ones by how many records they touch."""
    found = [*_by_record(audit), *_by_repeats(audit), *_as_a_whole(audit, packing)]
    order = list(Severity)
    return tuple(sorted(found, key=lambda item: (order.index(item.severity), -item.share, list(Kind).index(item.kind))))


def total_of(audit: AuditPart) -> Figures:
    return sum(audit.figures.values(), Figures())


def by_split(audit: AuditPart) -> dict[str, Figures]:
    """In the order in which the splits came."""
    sums: dict[str, Figures] = {}
    for (split, _), figures in audit.figures.items():
        sums[split] = sums.get(split, Figures()) + figures
    return sums


def by_source(audit: AuditPart) -> dict[str, Figures]:
    sums: dict[str, Figures] = {}
    for (_, source), figures in audit.figures.items():
        sums[source] = sums.get(source, Figures()) + figures
    return sums


def _finding(
    kind: Kind,
    splits: Mapping[str, int],
    total: int,
    examples: tuple[Example, ...],
    *,
    share: float | None = None,
    unit: str = "records",
) -> Finding:
    severity, meaning, advice = _TEXTS[kind]
    count = sum(splits.values())
    share = count / total if share is None else share
    return Finding(kind, severity, count, share, dict(splits), meaning, advice, examples, unit)


def _by_record(audit: AuditPart) -> Iterator[Finding]:
    total = total_of(audit)
    for kind in Kind:
        counts = {split: count for split, f in by_split(audit).items() if (count := f.kinds.get(kind, 0))}
        if counts:
            examples = tuple(item for split in counts for item in audit.examples.get((kind, split), ()))
            yield _finding(kind, counts, total.records, examples)
    typical = quantile(total.lengths, 0.99)
    outliers = [item for item in audit.longest if -item.negative_length > OUTLIER_FACTOR * max(typical, 1)]
    if outliers:
        splits = {split: sum(o.where.split == split for o in outliers) for split in by_split(audit)}
        examples = tuple(Example(o.where, f"{-o.negative_length:,} tokens") for o in outliers)
        yield _finding(Kind.OUTLIER, {k: v for k, v in splits.items() if v}, total.records, examples)


def _by_repeats(audit: AuditPart) -> Iterator[Finding]:
    config, table = audit.limits.config, audit.table
    total, limit = total_of(audit).records, config.num_examples
    for kind, look in (
        (Kind.REMOVED_DUPLICATE if audit.limits.removes_duplicates else Kind.DUPLICATE, duplicates),
        (Kind.LEAK, leaks),
        (Kind.PROMPT_LEAK, prompt_leaks),
        (Kind.CONFLICT, conflicts),
    ):
        repeats: Repeats = look(table, limit)
        if repeats.counts:
            examples = tuple(Example(where, "", other) for where, other in repeats.examples)
            yield _finding(kind, repeats.counts, total, examples)
    often = max(config.repeated_answer_share * len(table), _FEWEST_REPEATED)
    repeats, sizes = repeated_answers(table, often, limit)
    if repeats.counts:
        pairs = zip(repeats.examples, sizes, strict=True)
        examples = tuple(Example(where, f"its answer comes {size:,} times") for (where, _), size in pairs)
        yield _finding(Kind.REPEATED_ANSWER, repeats.counts, total, examples)


def _as_a_whole(audit: AuditPart, packing: Mapping[str, Packing]) -> Iterator[Finding]:
    splits = by_split(audit)
    empty = {name: 1 for name in (*packing, *splits) if not (f := splits.get(name)) or f.records == f.dropped}
    if empty:
        yield _finding(Kind.EMPTY_SPLIT, empty, max(len(packing), len(splits)), (), unit="splits")
    total = total_of(audit)
    trained = trained_share(total)
    if total.tokens and trained < _LOW_TRAINED_SHARE:
        counts = {name: f.trained_tokens for name, f in splits.items()}
        yield _finding(Kind.LOW_TRAINED_SHARE, counts, total.tokens, (), share=trained, unit="tokens")
    packed = packed_share(packing)
    if packed < _LOW_PACKED_SHARE:
        tokens = {name: item.tokens for name, item in packing.items()}
        yield _finding(Kind.LOOSE_PACKS, tokens, 1, (), share=packed, unit="tokens")


def trained_share(figures: Figures) -> float:
    """1 where there are no tokens."""
    return figures.trained_tokens / figures.tokens if figures.tokens else 1.0


def stop_share(figures: Figures) -> float:
    """1 where there are no answers."""
    return figures.answers_with_stop / figures.answers if figures.answers else 1.0


def packed_share(packing: Mapping[str, Packing]) -> float:
    """Of all splits with packs together; 1 where there are none."""
    places = sum(item.packs * item.seq_len for item in packing.values())
    return sum(item.tokens for item in packing.values()) / places if places else 1.0
