"""The planted cohort, written once, and one full evaluation of it."""

from __future__ import annotations

from typing import Any

import pytest
from evaluation_world import World, evaluated, filters, world

from latent_medi.evaluation.results import Metrics, metrics_of

__all__ = ["metrics", "results", "world"]


@pytest.fixture(scope="session")
def metrics(world: World) -> dict[str, Any]:
    """What the evaluation writes."""
    return evaluated(world.settings("full", colour_free=True, real_splits=30, memorisation=True), [filters()])


@pytest.fixture(scope="session")
def results(metrics: dict[str, Any]) -> Metrics:
    """The same as a dataclass."""
    return metrics_of(metrics)
