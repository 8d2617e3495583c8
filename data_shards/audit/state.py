"""An unfinished audit as JSON, so that preparing goes on after a kill without encoding again. It can't execute.

Arrays are base64 of their little-endian bytes. That they are what was written is the caller's affair:
``signed_json.py`` guards a document by a hash.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np

from data_shards.audit.figures import Figures, RoleFigures, TokenCounts
from data_shards.audit.kind import Kind
from data_shards.audit.part import AuditLimits, AuditPart, Example, Long, Sample
from data_shards.audit.table import ROW, Place, Table, Where

_PLAIN = ("records", "tokens", "trained_tokens", "unknown_tokens", "answers", "answers_with_stop", "longest")


def to_json(part: AuditPart) -> dict[str, Any]:
    """All but ``limits``, which the configuration gives."""
    return {
        "figures": [[split, source, _figures(figures)] for (split, source), figures in part.figures.items()],
        "examples": [
            [kind.value, split, [_example(item) for item in items]] for (kind, split), items in part.examples.items()
        ],
        "tokens": [_bytes(part.tokens.ids, "<i8"), _bytes(part.tokens.counts, "<i8")],
        "places": [list(place) for place in part.table.places],
        "rows": [_bytes(chunk, ROW) for chunk in part.table.chunks],
        "samples": [_sample(item) for item in part.samples],
        "longest": [[item.negative_length, list(item.where)] for item in part.longest],
    }


def from_json(body: dict[str, Any], limits: AuditLimits) -> AuditPart:
    """Raises ValueError for anything that ``to_json`` did not give."""
    try:
        return AuditPart(
            {(split, source): _figures_from(value) for split, source, value in body["figures"]},
            {
                (Kind(kind), split): tuple(_example_from(item) for item in items)
                for kind, split, items in body["examples"]
            },
            TokenCounts(*(_array(data, "<i8") for data in body["tokens"])),
            Table(tuple(Place(*place) for place in body["places"]), tuple(_array(rows, ROW) for rows in body["rows"])),
            tuple(_sample_from(item) for item in body["samples"]),
            tuple(Long(length, Where(*where)) for length, where in body["longest"]),
            limits,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the state of an audit ({type(error).__name__}: {error})") from error


def _bytes(array: np.ndarray, dtype: Any) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


def _array(data: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(data, validate=True), dtype)


def _figures(figures: Figures) -> dict[str, Any]:
    return {
        **{name: getattr(figures, name) for name in _PLAIN},
        "lengths": _bytes(figures.lengths, "<i8"),
        "trained_lengths": _bytes(figures.trained_lengths, "<i8"),
        "roles": {role: list(found) for role, found in figures.roles.items()},
        "kinds": {kind.value: count for kind, count in figures.kinds.items()},
    }


def _figures_from(value: dict[str, Any]) -> Figures:
    sums = {name: value[name] for name in _PLAIN}
    return replace(
        Figures(**sums),
        lengths=_array(value["lengths"], "<i8"),
        trained_lengths=_array(value["trained_lengths"], "<i8"),
        roles={role: RoleFigures(*found) for role, found in value["roles"].items()},
        kinds={Kind(kind): count for kind, count in value["kinds"].items()},
    )


def _example(example: Example) -> list[Any]:
    return [list(example.where), example.detail, example.other and list(example.other)]


def _example_from(value: list[Any]) -> Example:
    where, detail, other = value
    return Example(Where(*where), detail, other and Where(*other))


def _sample(sample: Sample) -> list[Any]:
    pieces = [[start, _bytes(ids, "<i4"), _bytes(trained, "?")] for start, ids, trained in sample.pieces]
    return [sample.key, list(sample.where), sample.source, sample.num_tokens, sample.num_trained, pieces]


def _sample_from(value: list[Any]) -> Sample:
    key, where, source, num_tokens, num_trained, pieces = value
    shown = tuple((start, _array(ids, "<i4"), _array(trained, "?")) for start, ids, trained in pieces)
    return Sample(key, Where(*where), source, num_tokens, num_trained, shown)
