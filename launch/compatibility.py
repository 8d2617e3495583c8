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
    "watchdog",
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
    "training.on_nonfinite",
    "training.max_skipped_in_a_row",
    "training.steps",
    "training.epochs",
)


class Difference(NamedTuple):
    key: str
    was: Any
    now: Any
    note: str = ""

    def __str__(self) -> str:
        return f"{self.key}: was {self.was!r}, now {self.now!r}" + (f" ({self.note})" if self.note else "")


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
    """Differences that matter between two run records: ``config``, ``base``, and ``data`` (a fingerprint's parts).

    ``base_files``, where both have it, tells which of the base's files changed.
    """
    changed_files = _changed_files(was.get("base_files", {}), now.get("base_files", {}))
    found = []
    for section, prefix in (("config", ""), ("base", "model.base"), ("data", "data")):
        old, new = flatten(was[section], prefix), flatten(now[section], prefix)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key) and (section != "config" or _matters(key)):
                note = changed_files if section == "base" else ""
                found.append(Difference(key, old.get(key), new.get(key), note))
    return found


def _changed_files(was: dict[str, str], now: dict[str, str]) -> str:
    """What became of the base's files, in words; nothing where either side did not record them."""
    if not was or not now:
        return ""
    changed = [f"{name} has other contents" for name in sorted(was.keys() & now.keys()) if was[name] != now[name]]
    gone = [f"{name} is gone" for name in sorted(was.keys() - now.keys())]
    return ", ".join(changed + gone + [f"{name} is new" for name in sorted(now.keys() - was.keys())])


def allowed(key: str, allow: Sequence[str]) -> bool:
    """Whether an entry of ``resume.allow`` covers the key; it covers its own and all below it."""
    return any(key == entry or key.startswith(f"{entry}.") for entry in allow)


def refused(found: Sequence[Difference], allow: Sequence[str]) -> list[Difference]:
    """Those that ``resume.allow`` does not cover."""
    return [d for d in found if not allowed(d.key, allow)]
