"""JSON documents that carry their own hash, so that a truncated or edited one does not count as one."""

from __future__ import annotations

import json
from typing import Any

from data_shards.errors import CorruptFile
from data_shards.storage import sha256


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def encode(payload: dict[str, Any], kind: str, version: int) -> bytes:
    """The document's bytes: readable, with ``kind``, ``version`` and the sha256 of everything else."""
    body = {"kind": kind, "version": version, **payload}
    text = json.dumps({**body, "sha256": sha256(canonical(body))}, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def decode(data: bytes, kind: str, newest_version: int, where: str) -> dict[str, Any]:
    """The payload. Raises CorruptFile unless hash and kind are right and the version is one that we know."""
    try:
        body = json.loads(data)
        claimed = body.pop("sha256")
        version = int(body["version"])
        found = sha256(canonical(body))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CorruptFile(f"{where}: not a complete {kind} ({type(error).__name__}: {error})") from error
    if found != claimed:
        raise CorruptFile(f"{where}: its contents do not match its own hash; it was cut off or edited")
    if body.pop("kind", None) != kind:
        raise CorruptFile(f"{where}: is not a {kind}")
    if version > newest_version:
        raise CorruptFile(
            f"{where}: format version {version}, this Baton reads up to {newest_version}; use a newer Baton"
        )
    del body["version"]
    return body
