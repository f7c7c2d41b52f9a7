"""One evaluation of the planted cohort to report on."""

from __future__ import annotations

from typing import Any

import pytest
from evaluation_world import Size, World, build_world, filters

from latent_medi.evaluation.evaluate import evaluate


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("report-world"), Size(8, 8, 10, 3), count=30)


@pytest.fixture(scope="session")
def evaluated(small_world: World) -> dict[str, Any]:
    return evaluate(small_world.settings("full", colour_free=True, repeats=1, resamples=30), [filters()])
