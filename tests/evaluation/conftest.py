"""The planted cohort, written once, and one full evaluation of it."""

from __future__ import annotations

from typing import Any

import pytest
from evaluation_world import World, build_world, filters

from latent_medi.evaluation.evaluate import evaluate


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def metrics(world: World) -> dict[str, Any]:
    return evaluate(world.settings("full", colour_free=True, deals=30, memorisation=True), [filters()])
