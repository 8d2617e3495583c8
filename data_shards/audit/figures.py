"""What is added up over the records of one source in one split (pure)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data_shards.audit.histogram import EDGES, quantile
from data_shards.audit.kind import DROPPED, Kind


def _no_lengths() -> np.ndarray:
    return np.zeros(len(EDGES), np.int64)


class RoleFigures(NamedTuple):
    messages: int = 0
    characters: int = 0


@dataclass(frozen=True)
class Figures:
    """Sums over records. ``tokens``, ``trained_tokens`` and ``answers`` leave dropped records out and count the others
    as encoded, before anything is cut."""

    records: int = 0
    """all that were read, dropped ones too"""
    tokens: int = 0
    trained_tokens: int = 0
    """that something comes before"""
    unknown_tokens: int = 0
    answers: int = 0
    """runs of trained tokens"""
    answers_with_stop: int = 0
    longest: int = 0
    """tokens of the longest record that could be encoded, dropped or not"""
    lengths: np.ndarray = field(default_factory=_no_lengths)
    """histogram of tokens per encoded record"""
    trained_lengths: np.ndarray = field(default_factory=_no_lengths)
    """histogram of trained tokens per record that is not dropped"""
    roles: dict[str, RoleFigures] = field(default_factory=dict)
    kinds: dict[Kind, int] = field(default_factory=dict)
    """records by kind of trouble"""

    def __add__(self, other: Figures) -> Figures:
        roles = {
            role: RoleFigures(*map(sum, zip(self.roles.get(role, (0, 0)), other.roles.get(role, (0, 0)), strict=True)))
            for role in sorted({*self.roles, *other.roles})
        }
        return Figures(
            self.records + other.records,
            self.tokens + other.tokens,
            self.trained_tokens + other.trained_tokens,
            self.unknown_tokens + other.unknown_tokens,
            self.answers + other.answers,
            self.answers_with_stop + other.answers_with_stop,
            max(self.longest, other.longest),
            self.lengths + other.lengths,
            self.trained_lengths + other.trained_lengths,
            roles,
            dict(Counter(self.kinds) + Counter(other.kinds)),
        )

    @property
    def dropped(self) -> int:
        return sum(self.kinds.get(kind, 0) for kind in DROPPED)

    def to_json(self) -> dict[str, Any]:
        return {
            "records": self.records,
            "dropped_records": self.dropped,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
            "unknown_tokens": self.unknown_tokens,
            "answers": self.answers,
            "answers_with_stop_token": self.answers_with_stop,
            "length_median": min(quantile(self.lengths, 0.5), self.longest),
            "length_p99": min(quantile(self.lengths, 0.99), self.longest),
            "length_longest": self.longest,
            "lengths": _pairs(self.lengths),
            "trained_lengths": _pairs(self.trained_lengths),
            "roles": {role: figures._asdict() for role, figures in sorted(self.roles.items())},
            "kinds": {kind.value: self.kinds[kind] for kind in Kind if self.kinds.get(kind)},
        }


def _pairs(counts: np.ndarray) -> list[list[int]]:
    """``[smallest length in the bin, records]`` of each bin that has any."""
    return [[int(EDGES[index]), int(counts[index])] for index in np.flatnonzero(counts)]


class TokenCounts(NamedTuple):
    """How often each token id is used; ``ids`` int64 ``[n]`` ascending, ``counts`` int64 ``[n]`` > 0."""

    ids: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray) -> TokenCounts:
        return cls._of_dense(np.bincount(ids))

    @classmethod
    def _of_dense(cls, dense: np.ndarray) -> TokenCounts:
        ids = np.flatnonzero(dense)
        return cls(ids, dense[ids].astype(np.int64))

    def merged(self, other: TokenCounts) -> TokenCounts:
        dense = np.zeros(max(self.ids.max(initial=-1), other.ids.max(initial=-1)) + 1, np.int64)
        for part in (self, other):
            dense[part.ids] += part.counts
        return self._of_dense(dense)
