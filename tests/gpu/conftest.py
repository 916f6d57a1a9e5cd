"""For the sanitizers, which slow everything down: WORKER_ORCD_TEST_EVERY=9 keeps every ninth GPU test.

Tests come sorted by what they test and then by type or size, so a stride that shares no factor with those takes some
of each.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    stride = int(os.environ.get("WORKER_ORCD_TEST_EVERY", "1"))
    here = Path(__file__).parent
    mine = [item for item in items if item.path.is_relative_to(here)]
    dropped = set(mine) - set(mine[::stride])
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]
