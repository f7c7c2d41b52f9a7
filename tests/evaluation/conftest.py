"""The planted cohort, written once, and one full evaluation of it."""

from __future__ import annotations

from typing import Any

import pytest
from evaluation_world import World, filters, world

from latent_medi.evaluation.evaluate import evaluate

__all__ = ["metrics", "world"]


@pytest.fixture(scope="session")
def metrics(world: World) -> dict[str, Any]:
    return evaluate(world.settings("full", colour_free=True, deals=30, memorisation=True), [filters()])
