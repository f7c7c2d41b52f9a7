"""A small experiment that tests of the runner build on: its network, its stages, its dataset and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parts import make_cohort

from latent_medi.core.config import build
from latent_medi.experiment.settings import STAGES, ExperimentSettings

NETWORK = {
    "block_out_channels": [16, 32],
    "attention": [False, True],
    "attention_head_dim": 16,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
"""A network that trains in a second."""

TO_SAMPLE = [
    name for name in STAGES[: STAGES.index("sample") + 1] if name not in ("corpus", "autoencoder", "real_classifier")
]


def small_experiment(folder: Path, **values: Any) -> ExperimentSettings:
    """Settings of an experiment on a tiny dataset of two sites in ``folder/data``, which is made if it is absent.

    Args:
        folder: The experiment's own folder is ``folder/out``.
        values: Changes of the settings.
    """
    if not (folder / "data").exists():
        make_cohort(folder / "data", ("aster", "birch"))
    own = {"data": str(folder / "data"), "out": str(folder / "out")}
    return build(ExperimentSettings, own | values)
