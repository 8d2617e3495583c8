"""The floors: data_shards (0) <- trainer (1) <- cluster (2) <- launch (3), and the rooms of data_shards. Imports go
down only."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = ("data_shards", "trainer", "cluster", "launch")
ROOMS = ("order", "sources", "encoding", "audit", "writing", "reading")
# What a floor must never import, wherever in a file the import stands.
FORBIDDEN = {
    "data_shards": {"torch", "ray", "deepspeed"},
    "trainer": {"ray"},
    "cluster": {"deepspeed"},
    "launch": {"deepspeed"},
}
DEEPSPEED_ROOMS = {
    "trainer/engine.py",
    "trainer/forward_engine.py",
    "trainer/meta_partition.py",
    "trainer/process_group.py",
}


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


def rooms_above(room: str, source: str) -> set[str]:
    """Rooms of data_shards that a file of ``room`` imports and must not."""
    named = {node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[1] for name in named if name.startswith("data_shards.")} & set(
        ROOMS[ROOMS.index(room) + 1 :]
    )


def test_rooms_of_data_shards_import_downwards() -> None:
    found = {room: list((ROOT / "data_shards" / room).glob("*.py")) for room in ROOMS}
    assert {path.name for path in (ROOT / "data_shards").iterdir() if path.is_dir()} - {"__pycache__"} == set(ROOMS)
    for room, files in found.items():
        assert len(files) > 2
        for path in files:
            assert not rooms_above(room, path.read_text()), path


def test_the_check_itself_can_fail() -> None:
    assert rooms_above("audit", "from data_shards.writing.tasks import Task") == {"writing"}
    assert violations("data_shards", "data_shards/x.py", "def f():\n    import torch") == {"torch"}
    assert violations("trainer", "trainer/x.py", "from cluster.config import ClusterConfig") == {"cluster"}
    assert violations("trainer", "trainer/loop.py", "import deepspeed") == {"deepspeed"}
