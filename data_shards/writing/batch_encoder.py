"""A batch of raw rows to sequences by split: what preparing does in its worker processes."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from data_shards.audit.batch import TokenizerFacts
from data_shards.audit.kind import Kind
from data_shards.audit.part import AuditLimits, AuditPart, Dropped, merge
from data_shards.config import CleaningConfig, DataConfig, TooLong
from data_shards.encoding.encoder import Encoded, Encoder
from data_shards.encoding.too_long import fit
from data_shards.sources.record import Record
from data_shards.sources.records import SourceBatch
from data_shards.splits import TRAIN, split_of, split_of_fold
from data_shards.writing.packing import Packing

# All of C0 and C1 but tab, line feed and carriage return.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class DropReason(StrEnum):
    TOO_LONG = "too_long"
    FILTERED = "filtered"
    DUPLICATE = "duplicate"


class BatchJob(NamedTuple):
    task: int
    role: str
    """the configuration's key that the source stands under: train, validation or test"""
    source_batch: SourceBatch


@dataclass(frozen=True)
class SplitPart:
    """What one batch, or several, gives to one split. n sequences of T tokens in all, from r records."""

    input_ids: np.ndarray
    """int32 [T]"""
    trained: np.ndarray
    """bool [T]"""
    lengths: np.ndarray
    """int64 [n]"""
    record_of: np.ndarray
    """int64 [n]: index of the record that a sequence comes from"""
    digests: tuple[bytes, ...]
    """[r], of 16 bytes each; none unless repeated records are left out"""
    num_records: int
    """r"""
    dropped: Mapping[str, int]
    truncated: int


class EncodedBatch(NamedTuple):
    job: BatchJob
    """without the rows themselves"""
    splits: dict[str, SplitPart]
    audit: AuditPart


class BatchEncoder:
    """Picklable. Raises DataError with file and line for a record that can't be used."""

    def __init__(self, config: DataConfig, encoders: Mapping[str | None, Encoder], facts: TokenizerFacts) -> None:
        """``encoders`` by the source's own chat template."""
        self._config = config
        self._encoders = dict(encoders)
        self._facts = facts
        self._limits = audit_limits(config)

    def __call__(self, job: BatchJob) -> EncodedBatch:
        with _no_search_for_cycles():
            return self._encoded(job)

    def _encoded(self, job: BatchJob) -> EncodedBatch:
        encoder = self._encoders[job.source_batch.source.chat_template]
        records = records_by_split(job.source_batch, job.role, self._config)
        encoded = {split: list(encoder.encode(found)) for split, found in records.items()}
        audit = (
            AuditPart.of(map(self._judged, items), split, self._facts, self._limits) for split, items in encoded.items()
        )
        parts = {split: self._part(items) for split, items in encoded.items()}
        rest = replace(job.source_batch, batch=replace(job.source_batch.batch, data=b""))
        return EncodedBatch(job._replace(source_batch=rest), parts, reduce(merge, audit))

    def _unwanted(self, encoded: Encoded) -> str | None:
        """Why the record is left out for its length, if it is."""
        length, cleaning = len(encoded.sequence.input_ids), self._config.cleaning
        if cleaning.min_tokens is not None and length < cleaning.min_tokens:
            return f"{length} tokens, fewer than data.cleaning.min_tokens={cleaning.min_tokens}"
        if cleaning.max_tokens is not None and length > cleaning.max_tokens:
            return f"{length} tokens, more than data.cleaning.max_tokens={cleaning.max_tokens}"
        return None

    def _judged(self, encoded: Encoded) -> Encoded | Dropped:
        record = encoded.record
        problem = self._unwanted(encoded)
        return encoded if problem is None else Dropped(record.path, record.line, Kind.FILTERED, problem, record.source)

    def _pieces(self, encoded: Encoded) -> list[Any]:
        record, limit = encoded.record, self._config.seq_len
        if self._config.packed == Packing.CONCATENATE:
            if record.text is None:
                raise record.error(
                    "a conversation, and data.packing=concatenate would cut it anywhere; that is for plain text. Use "
                    "best_fit"
                )
            return [encoded.sequence]
        length = len(encoded.sequence.input_ids)
        if length > limit and record.text is None and self._config.too_long == TooLong.ERROR:
            raise record.error(
                f"{length} tokens, more than data.seq_len={limit}; raise it, shorten the record, or set "
                "data.too_long=drop or truncate"
            )
        return fit(encoded.sequence, limit, self._config.too_long, record.text is not None)

    def _part(self, encoded: Sequence[Encoded]) -> SplitPart:
        sequences, record_of, dropped, truncated = [], [], dict.fromkeys(DropReason, 0), 0
        for index, item in enumerate(encoded):
            if self._unwanted(item):
                dropped[DropReason.FILTERED] += 1
                continue
            pieces = self._pieces(item)
            dropped[DropReason.TOO_LONG] += not pieces
            truncated += len(pieces) == 1 and len(pieces[0].input_ids) < len(item.sequence.input_ids)
            sequences += pieces
            record_of += [index] * len(pieces)
        return SplitPart(
            np.concatenate([np.zeros(0, np.int32), *(sequence.input_ids for sequence in sequences)]),
            np.concatenate([np.zeros(0, bool), *(sequence.trained for sequence in sequences)]),
            np.array([len(sequence.input_ids) for sequence in sequences], np.int64),
            np.array(record_of, np.int64),
            tuple(item.record.digest() for item in encoded) if self._config.cleaning.deduplicate else (),
            len(encoded),
            {reason.value: count for reason, count in dropped.items() if count},
            truncated,
        )


@contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """A batch makes thousands of objects, no cycles among them, and Python would look through all of them for some
    again and again. What is not referenced any more is freed at once either way."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def audit_limits(config: DataConfig) -> AuditLimits:
    return AuditLimits(
        config.seq_len, config.too_long.value, config.audit, removes_duplicates=config.cleaning.deduplicate
    )


def records_by_split(source_batch: SourceBatch, role: str, config: DataConfig) -> dict[str, list[Record]]:
    """A batch's records, cleaned, in their order. Raises DataError with file and line."""
    found: dict[str, list[Record]] = {}
    for record in source_batch.records():
        cleaned = clean(record, config.cleaning)
        found.setdefault(_split(cleaned, role, config), []).append(cleaned)
    return dict(sorted(found.items()))


def _split(record: Record, role: str, config: DataConfig) -> str:
    if role != TRAIN:
        return role
    if config.split.folds is not None:
        return split_of_fold(record.digest(), config.split.folds, config.split.fold)
    if not config.validation_fraction:
        return TRAIN  # its position need not be worked out
    return split_of(record.split_position(), config.validation_fraction)


def clean(record: Record, config: CleaningConfig) -> Record:
    """The record with its texts mended as asked. Raises DataError where nothing is left of one that had something."""
    if not config.strip and config.control_characters:
        return record

    def mended(text: str) -> str:
        kept = text if config.control_characters else _CONTROL.sub("", text)
        kept = kept.strip() if config.strip else kept
        if text and not kept:
            raise record.error(f"nothing is left of the text {text[:40]!r} after data.cleaning; mend it or take it out")
        return kept

    if record.text is not None:
        return replace(record, text=mended(record.text))
    messages = tuple({**turn, "content": mended(turn["content"])} for turn in record.messages)
    return replace(record, messages=messages)
