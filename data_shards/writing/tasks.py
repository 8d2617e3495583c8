"""A corpus cut into tasks: what is prepared in one go by one writer, beside others on other nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from data_shards.sources.config import SourceConfig
from data_shards.sources.files import SourceFile

_TASK_BYTES = 64 << 20
"""Files are joined to tasks of about this size. Part of the format: another value makes other windows."""


class Task(NamedTuple):
    number: int
    role: str
    source: SourceConfig
    files: tuple[SourceFile, ...]


def plan_tasks(sources: Iterable[tuple[str, SourceConfig, Sequence[SourceFile]]]) -> tuple[Task, ...]:
    """Small files of a source together, a large one alone; a source with a limit is one task, because only counting
    tells where it ends."""
    tasks: list[Task] = []
    for role, source, files in sources:
        groups: list[list[SourceFile]] = []
        size = 0
        for file in files:
            if not groups or (size + file.size > _TASK_BYTES and source.limit is None):
                groups.append([])
                size = 0
            groups[-1].append(file)
            size += file.size
        tasks += [Task(len(tasks) + i, role, source, tuple(group)) for i, group in enumerate(groups)]
    return tuple(tasks)
