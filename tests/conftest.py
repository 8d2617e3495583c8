"""For all tests."""

from __future__ import annotations

import pytest

LONGEST_FIRST = ("test_recovery", "test_ray_job", "test_readme", "test_metrics")
"""Files that two workers should begin with, so that neither is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
