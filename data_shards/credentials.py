"""Secrets in URIs: refused, because a run's configuration is printed, and recorded with the run and its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from data_shards.errors import BadInput

_TELLING = re.compile(r"secret|token|passw|signature|credential|access_?key|account_?key|\bsig$", re.IGNORECASE)
_PASSWORD = re.compile(r"[^:/]+://[^/@:]*:(?!\d+(?:/|$))[^@]+@")
"""``scheme://user:password@``, where the password may hold slashes that should have been escaped; no port."""
_INSTEAD = (
    "Give it in the environment of the cluster (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_KEY), in a file such as ~/.aws/credentials, or by the machine's role"
)


def may_be_secret(name: str) -> bool:
    """Whether what has this name should not be shown (pure)."""
    return _TELLING.search(name) is not None


def secret_in(uri: str) -> str | None:
    """Which part of a URI is a secret, in words that do not give it away; None where none is (pure)."""
    if "://" not in uri:
        return None
    place, _, options = uri.partition("?")
    if _PASSWORD.match(place):
        return "a password before the @"
    named = next((name for name, _ in parse_qsl(options) if may_be_secret(name)), None)
    return f"the option {named}" if named else None


def refuse_secret(uri: str, key: str) -> None:
    """Raises BadInput, which names ``key`` and not the URI."""
    if part := secret_in(uri):
        raise BadInput(
            f"{key}: the URI ({uri.partition('://')[0]}://…) holds {part}, and what is configured is printed and kept "
            f"with the run and its checkpoints, for all who may read those. {_INSTEAD}"
        )


def refuse_secrets(values: Any, key: str = "") -> None:
    """Of every string in a tree of mappings and sequences. Raises BadInput."""
    for name, value in _strings(values, key):
        refuse_secret(value, name)


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _strings(inner, f"{key}[{index}]")
