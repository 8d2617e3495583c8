"""For all tests."""

from __future__ import annotations

import os

import pytest

# Before torch is imported, here and in all that tests start: sums differ by the number of threads, and workers that
# share two cores would wait for each other's.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LONGEST_FIRST = ("test_ray_job", "test_disturbed_run", "test_readme")
"""Files that two workers should begin with, so that neither is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
