"""What the audit sees in one batch of encoded records (pure): arrays over all tokens, then only what stands out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from data_shards.audit.kind import Kind
from data_shards.audit.turns import Note, Turns
from data_shards.encoding.encoder import Encoded
from data_shards.sources.records import Record


@dataclass(frozen=True)
class TokenizerFacts:
    """What the audit has to know about a tokenizer."""

    stop_ids: tuple[int, ...]
    special_tokens: tuple[str, ...]
    """texts that become one special token wherever they stand"""
    vocab_size: int
    bos_id: int | None = None
    unk_id: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, stops: Sequence[str]) -> TokenizerFacts:
        """``stops``: the texts of the stop tokens."""
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        return cls(
            tuple(sorted(tokenizer.convert_tokens_to_ids(list(stops)))),
            tuple(sorted(special)),
            len(tokenizer),
            tokenizer.bos_token_id,
            tokenizer.unk_token_id,
        )


class Batch:
    """Some records in their order, with arrays over all of their tokens."""

    def __init__(self, encoded: Sequence[Encoded], facts: TokenizerFacts) -> None:
        self.records = [item.record for item in encoded]
        self.facts = facts
        sequences = [item.sequence for item in encoded]
        self.lengths = np.array([len(sequence.input_ids) for sequence in sequences], np.int64)
        """int64 ``[n]``"""
        self.stops = np.cumsum(self.lengths)
        self.starts = self.stops - self.lengths
        self.ids = np.concatenate([np.zeros(0, np.int32), *(sequence.input_ids for sequence in sequences)])
        """int32 ``[T]``, all tokens"""
        self.trained = np.concatenate([np.zeros(0, bool), *(sequence.trained for sequence in sequences)])
        self.filled = np.flatnonzero(self.lengths)
        self.targets = np.zeros(len(encoded), np.int64)
        """int64 ``[n]``: trained tokens that something comes before"""
        if len(self.filled):
            first = self.starts[self.filled]
            sums = np.add.reduceat(self.trained.view(np.uint8), first, dtype=np.int64)
            self.targets[self.filled] = sums - self.trained[first]
        self.turns = Turns.of(self.records)

    @cached_property
    def _ends(self) -> np.ndarray:
        """Index of the last token of each run of trained ones: int64 ``[runs]``."""
        follows = np.append(self.trained[1:], False)
        follows[self.stops[self.filled] - 1] = False
        return np.flatnonzero(self.trained & ~follows)

    def _owners(self, tokens: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.stops, tokens, side="right")

    @cached_property
    def answers(self) -> np.ndarray:
        """Runs of trained tokens of each record: int64 ``[n]``."""
        return np.bincount(self._owners(self._ends), minlength=len(self.records))

    @cached_property
    def answers_without_stop(self) -> np.ndarray:
        """Those that end without a stop token: int64 ``[n]``. One more token may follow it: some templates mark the
        line end behind it as the answer's."""
        stops = np.array(self.facts.stop_ids, np.int32)
        before = np.maximum(self._ends - 1, 0)
        stopped = np.isin(self.ids[self._ends], stops) | (np.isin(self.ids[before], stops) & self.trained[before])
        return np.bincount(self._owners(self._ends[~stopped]), minlength=len(self.records))

    @cached_property
    def unknown(self) -> np.ndarray:
        """Unknown tokens of each record: int64 ``[n]``."""
        found = np.flatnonzero(self.ids == self.facts.unk_id) if self.facts.unk_id is not None else np.zeros(0, int)
        return np.bincount(self._owners(found), minlength=len(self.records))

    def notes(self, min_trained_tokens: int) -> Iterator[Note]:
        """Everything that stands out, kind by kind and within it in the records' order; a record may come twice."""
        yield from self._token_notes(min_trained_tokens)
        yield from self.turns.notes
        yield from self.turns.text_notes(self.facts.special_tokens)

    def _token_notes(self, min_trained_tokens: int) -> Iterator[Note]:
        for index in np.flatnonzero(self.targets == 0).tolist():
            yield index, Kind.TRAINS_ON_NOTHING, f"none of {self.lengths[index]} tokens"
        for index in np.flatnonzero((self.targets > 0) & (self.targets < min_trained_tokens)).tolist():
            if not self._only_stops(index):
                yield index, Kind.SHORT_ANSWER, f"{self.targets[index]} trained tokens"
        for index in np.flatnonzero((self.targets > 0) & (self.targets <= self.answers)).tolist():
            if self._only_stops(index):
                yield index, Kind.ONLY_STOP_TOKEN, f"{self.targets[index]} trained tokens"
        for index in np.flatnonzero(self.answers_without_stop).tolist():
            yield index, Kind.NO_STOP_TOKEN, f"{self.answers_without_stop[index]} of {self.answers[index]} answers"
        for index in np.flatnonzero(self.unknown).tolist():
            yield index, Kind.UNKNOWN_TOKENS, f"{self.unknown[index]} of {self.lengths[index]} tokens"
        if self.facts.bos_id is not None:
            several = np.flatnonzero(self.lengths > 1)
            heads = self.ids[self.starts[several]], self.ids[self.starts[several] + 1]
            for index in several[(heads[0] == self.facts.bos_id) & (heads[1] == self.facts.bos_id)].tolist():
                yield index, Kind.TWO_BOS_TOKENS, ""

    def _only_stops(self, index: int) -> bool:
        tokens = slice(self.starts[index], self.stops[index])
        return bool(np.isin(self.ids[tokens][self.trained[tokens]], self.facts.stop_ids).all())


def by_source(records: Sequence[Record]) -> dict[str, list[int]]:
    """Indices of the records of each source, in order."""
    sources: dict[str, list[int]] = defaultdict(list)
    for index, record in enumerate(records):
        sources[getattr(record, "source", "")].append(index)
    return sources
