"""Whether samples are tissue of the held-out combinations at all: nearer to it than real patches of others are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from latent_medi.evaluation.cohort.comparison_sets import Comparison
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.evaluation.fidelity.records import TissueDistance
from latent_medi.statistics.kernel_distance import KernelSet, kernel_distance
from latent_medi.statistics.subsampling import patients_in_turn

_MOST = 1000
"""Patches of each set in a distance."""


def tissue_distances(
    study: Study, features: Features, comparisons: Sequence[Comparison], seed: int
) -> dict[str, TissueDistance]:
    """Mean kernel distance to the test patches of held-out combinations, of each synthetic set, and of the real
    training patches.

    Args:
        study: The cohort.
        features: Features of one encoder.
        comparisons: Of the held-out combinations.
        seed: Seed of subsamples.
    """
    others = _some(study.train, study.patients, seed)
    found: dict[str, list[tuple[float, float]]] = {}
    if len(set(study.patients[others])) < 2:
        return {}
    training = KernelSet(features.real[others], study.patients[others])
    for comparison in comparisons:
        rows = _some(comparison.reference, study.patients, seed)
        if not comparison.rows or len(set(study.patients[rows])) < 2:
            continue
        reference = KernelSet(features.real[rows], study.patients[rows])
        of_training = kernel_distance(reference, training).value
        for name in study.synthetic:
            if name in comparison.rows:
                drawn = np.random.default_rng([seed, 67]).permutation(comparison.rows[name])[:_MOST]
                sample = KernelSet(features.synthetic[name][np.sort(drawn)])
                found.setdefault(name, []).append((kernel_distance(reference, sample).value, of_training))
    means = {name: np.mean(values, axis=0) for name, values in found.items()}
    return {n: TissueDistance(float(mean[0]), float(mean[1]), len(found[n])) for n, mean in means.items()}


def _some(rows: np.ndarray, patients: np.ndarray, seed: int) -> np.ndarray:
    kept: np.ndarray = rows[patients_in_turn(patients[rows], _MOST, np.random.default_rng([seed, 61]))]
    return kept
