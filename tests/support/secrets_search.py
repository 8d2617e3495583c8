"""Looks for planted secrets in what a run leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def leaks(folder: Path, secrets: Mapping[str, str]) -> list[str]:
    """``<path>: <name>`` for each file below a folder, name or content, that holds one of the secrets' values."""
    found = []
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        held = [name for name, value in secrets.items() if value.encode() in content or value in str(path)]
        found += [f"{path.relative_to(folder)}: {name}" for name in held]
    return found
