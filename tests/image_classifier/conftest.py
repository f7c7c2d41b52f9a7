"""The demo's tissue at 64 px, a synthetic set with a selection, and settings of short trainings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parts import put_index

from latent_medi.demo import cohort
from latent_medi.demo.settings import CohortSettings
from latent_medi.image_classifier.settings import AugmentSettings, ImageClassifierSettings
from latent_medi.shards.dataset import PatchDataset

Make = Callable[..., ImageClassifierSettings]

MILD = AugmentSettings(
    crop_scale=(0.6, 1.0), vflip=0.5, rand_augment="rand-m5-n1", mixup=0.2, cutmix=0.5, erase=0.1, smoothing=0.1
)


@pytest.fixture(scope="session")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dataset folder: 192 training, 112 probe and 96 test patches of 64 px of three classes."""
    sizes = CohortSettings(train_patients=4, probe_patients=2, test_patients=2, patches_per_patient=4)
    folder = tmp_path_factory.mktemp("tissue") / "data"
    cohort.build(folder, sizes, jobs=1)
    return folder


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> PatchDataset:
    """As if generated, with a selection "best" of every second patch, the last ones best, and a control."""
    sizes = CohortSettings(seed=1, train_patients=2, probe_patients=1, test_patients=1, patches_per_patient=2)
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    dataset = cohort.build(folder, sizes, jobs=1)
    put_index(folder, dataset.index.assign(origin="synthetic", split_main="train"))
    dataset, n = PatchDataset.open(folder), len(dataset)
    even = np.arange(n) % 2 == 0
    dataset.add_selection("best", {"": even, "_control": ~even, "_score": -np.arange(n, dtype=float)}, {}, {})
    return dataset


@pytest.fixture
def make(tissue: Path, tmp_path: Path) -> Make:
    """Settings of a run in a fresh folder, with overrides: a tiny vision transformer."""

    def settings(**values: Any) -> ImageClassifierSettings:
        defaults: dict[str, Any] = {
            "data": str(tissue),
            "out": str(tmp_path / "run"),
            "validation_value": "probe",
            "network": "test_vit",
            "image_size": 64,
            "augment": MILD,
            "max_steps": 12,
            "global_batch": 8,
            "lr": 1e-3,
            "evaluate_every_images": 32,
            "checkpoint_every_images": 32,
            "log_every_images": 32,
        }
        return ImageClassifierSettings(**{**defaults, **values})

    return settings
