"""Which libraries made a run."""

from __future__ import annotations

import importlib.metadata
import sys

_VERSIONED = ("torch", "deepspeed", "transformers", "peft", "ray", "pyarrow")


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # Ray need not be there under torchrun
    return found
