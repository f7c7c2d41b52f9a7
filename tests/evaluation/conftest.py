"""The planted cohort, written once, and one full evaluation of it."""

from __future__ import annotations

from typing import Any

import pytest
from evaluation_world import World, evaluated, filters, world

__all__ = ["metrics", "world"]


@pytest.fixture(scope="session")
def metrics(world: World) -> dict[str, Any]:
    return evaluated(world.settings("full", colour_free=True, real_splits=30, memorisation=True), [filters()])
