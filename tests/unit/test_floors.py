"""The floors: data_shards (0) <- trainer (1) <- cluster (2) <- launch (3). Imports go down only."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("data_shards", "trainer", "cluster", "launch")
# What a floor must never import, wherever in a file the import stands.
FORBIDDEN = {
    "data_shards": {"torch", "ray", "deepspeed"},
    "trainer": {"ray"},
    "cluster": {"deepspeed"},
    "launch": {"deepspeed"},
}
DEEPSPEED_ROOMS = {"trainer/engine.py", "trainer/forward_engine.py", "trainer/process_group.py"}


def imported(source: str) -> set[str]:
    """Top-level packages that a file imports, at its head or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def violations(floor: str, relative: str, source: str) -> set[str]:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    found = imported(source) & (above | FORBIDDEN[floor])
    if floor == "trainer" and relative not in DEEPSPEED_ROOMS:
        found |= imported(source) & {"deepspeed"}
    return found


def test_imports_go_down_only() -> None:
    files = [path for floor in FLOORS for path in (ROOT / floor).glob("**/*.py")]
    assert len(files) > 30
    for path in files:
        relative = path.relative_to(ROOT).as_posix()
        assert not violations(relative.split("/")[0], relative, path.read_text()), relative


def test_the_check_itself_can_fail() -> None:
    assert violations("data_shards", "data_shards/x.py", "def f():\n    import torch") == {"torch"}
    assert violations("trainer", "trainer/x.py", "from cluster.config import ClusterConfig") == {"cluster"}
    assert violations("trainer", "trainer/loop.py", "import deepspeed") == {"deepspeed"}
