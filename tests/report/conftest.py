"""One evaluation of the planted cohort to report on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser, browser
from evaluation_world import Size, World, build_world, filters
from evaluation_world import evaluated as evaluate

from latent_medi.shards.dataset import PatchDataset


@pytest.fixture(scope="session")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("report-world"), Size(8, 8, 10, 3), count=30)


@pytest.fixture(scope="session")
def evaluated(small_world: World) -> dict[str, Any]:
    found = evaluate(small_world.settings("full", colour_free=True, repeats=1), [filters()])
    found["dataset"]["folder"] = str(small_world.real)  # pages of the tests lie elsewhere than its metrics
    for name in found["synthetic"]:
        found["synthetic"][name]["folder"] = str(small_world.root / name)
    return found


@pytest.fixture(scope="session")
def full(evaluated: dict[str, Any], small_world: World) -> dict[str, Any]:
    """The same with what an evaluation may add: memorisation with copies, distances per site."""
    metrics = copy.deepcopy(evaluated) | {"memorisation": {}}
    real, medi = PatchDataset.open(small_world.real).index, PatchDataset.open(small_world.medi).index["key"]
    listed = [
        {
            "synthetic_key": medi[i],
            "train_row": i,
            "patient": str(real["patient"][i]),
            "likeness": 0.99 - 0.01 * i,
            "view": "mirrored",
            "copy": True,
        }
        for i in range(14)
    ]
    none = {"n": 30, "copies": 0, "median_train": None, "median_held_out": None, "nearer_train": None, "n_bank": 0}
    known = {"copies": 14, "median_train": 0.5, "median_held_out": 0.75, "nearer_train": 0.6, "n_bank": 20}
    combinations = [
        none | known | {"name": "stripes × south", "combination": {"class": "stripes", "site": "south"}},
        none | {"name": "rings × east", "combination": {}},
    ]
    ct = {"value": None, "n_patches": 60, "left_out": 0}
    clean = {"value": 0.0, "n_patches": 60, "n_patients": 0, "interval": [0.0, 0.06]}
    rate = {"value": 14 / 60, "n_patches": 60, "n_patients": 0, "interval": [0.14, 0.35]}
    for name, fidelity in metrics["fidelity"].items():
        fidelity["per_site"] = copy.deepcopy(fidelity["per_class"])
        metrics["memorisation"][name] = {
            "fingerprint": fidelity["fingerprint"],
            "rule": "nearer than the nearest held-out patient",
            "threshold": 0.2,
            "threshold_patches": 500,
            "real_duplicates": {},
            "synthetic": {
                "medi": {
                    "copies": 14,
                    "copy_rate": rate,
                    "auth_pct": rate | {"value": 81.5, "interval": None},
                    "ct": ct | {"value": -1.5},
                    "combinations": combinations,
                    "listed": listed,
                },
                "cls": {
                    "copies": 0,
                    "copy_rate": clean,
                    "auth_pct": clean,
                    "ct": ct,
                    "combinations": [],
                    "listed": [],
                },
            },
            "held_out_flagged": {"value": 0.008, "n_patches": 500, "n_patients": 20, "interval": [0.0, 0.02]},
            "held_out_auth_pct": clean,
        }
    return metrics


@pytest.fixture(scope="session")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A tab of headless Chromium."""
    with browser(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened
