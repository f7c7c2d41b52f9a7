"""Settings of a tiny run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from parts import small_model

from latent_medi.training.settings import TrainSettings


@pytest.fixture
def run_settings(tiny: Path, tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a run of 40 updates in a fresh folder, with overrides."""

    def make(**values: Any) -> TrainSettings:
        model = replace(small_model(), **values.pop("model", {}))
        defaults: dict[str, Any] = {
            "data": str(tiny / "data"),
            "latents": str(tiny / "latents"),
            "out": str(tmp_path / "run"),
            "max_steps": 40,
            "global_batch": 8,
            "lr": 1e-3,
            "checkpoint_every_images": 64,
            "log_every_images": 40,
            "model": model,
        }
        return TrainSettings(**{**defaults, **values})

    return make
