"""May this configuration continue that run? (pure)

What decides the weights at step s must be the same: data, base model, seed, global batch, optimizer, method. Everything
else is free to change. Data and base are compared by fingerprint and identity, not by where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

FREE = (
    "run",
    "cluster",
    "metrics",
    "checkpoint",
    "evaluation",
    "export",
    "resume",
    "zero",
    "data",  # by fingerprint
    "model.base",  # by identity
    "model.revision",
    "model.activation_checkpointing",
    "model.attention",
    "training.micro_batch",
    "training.log_every",
    "training.deterministic",
    "training.steps",
    "training.epochs",
)


class Difference(NamedTuple):
    key: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: was {self.was!r}, now {self.now!r}"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` to ``{"a.b": 1}``."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{name}" if prefix else name)
    return flat


def _matters(key: str) -> bool:
    return not any(key == free or key.startswith(f"{free}.") for free in FREE)


def differences(was: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    """Differences that matter between two run records: ``config``, ``base``, and ``data`` (a fingerprint's parts)."""
    found = []
    for section, prefix in (("config", ""), ("base", "model.base"), ("data", "data")):
        old, new = flatten(was[section], prefix), flatten(now[section], prefix)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and (section != "config" or _matters(key)):
                found.append(Difference(key, old.get(key), new.get(key)))
    return found


def refused(found: Sequence[Difference], allow: Sequence[str]) -> list[Difference]:
    """Those that no entry of ``resume.allow`` covers; an entry covers its key and all below it."""
    return [d for d in found if not any(d.key == key or d.key.startswith(f"{key}.") for key in allow)]
