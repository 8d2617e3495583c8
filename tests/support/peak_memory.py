"""How much memory something takes at its worst moment, as the kernel counts it: mapped files included (Linux)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path


def peak_growth(action: Callable[[], object]) -> tuple[int, int]:
    """Bytes resident before, and how many more at most while ``action`` ran."""
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM counts anew (proc(5))
    before = _bytes_of("VmRSS")
    action()
    return before, _bytes_of("VmHWM") - before


def _bytes_of(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
