"""Real patches of the demo's cohort from any number of patients; a run holds only what its models need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from joblib import Parallel, delayed

from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.demo.cohort import Patient, patches, patients
from latent_medi.demo.settings import CohortSettings
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.shards.writing.writer import Patch


def demo_run(folder: Path) -> ExperimentSettings:
    """Settings of a finished demo."""
    run = config.build(ExperimentSettings, yaml.safe_load((folder / "settings.yaml").read_text("utf-8")))
    if run.recipe != "demo":
        raise UserError(
            f"{folder} is a run on {run.recipe} data", "give a finished demo: further real patients are drawn anew"
        )
    return run


def real_patches(seed: int, part: str, per_cell: int) -> tuple[np.ndarray, pd.DataFrame]:
    """Patches of patients that no network has seen.

    Args:
        seed: Seed of the cohort.
        part: "probe" or "test".
        per_cell: Patients per class and hospital (twice as many of a held-out combination in "probe").

    Returns:
        uint8 [n, 64, 64, 3] and a row per patch: patient and fields.
    """
    cohort = replace(CohortSettings(seed=seed), **{f"{part}_patients": per_cell})
    people = [patient for patient in patients(cohort) if patient.split == part]

    def of(patient: Patient) -> list[Patch]:
        return list(patches(patient, cohort))

    images: list[np.ndarray] = []
    rows: list[dict[str, Any]] = []
    for found in Parallel(n_jobs=-1, batch_size=16)(delayed(of)(patient) for patient in people):
        images += [patch.image for patch in found]
        rows += [{**patch.fields, "patient": patch.patient} for patch in found]
    return np.stack(images), pd.DataFrame(rows)


def in_batches(images: np.ndarray, size: int = 128) -> list[np.ndarray]:
    """Images in batches, as encoders take them."""
    return [images[start : start + size] for start in range(0, len(images), size)]
