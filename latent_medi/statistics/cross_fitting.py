"""A choice between variants that is made on other patients than those that it is scored on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

FOLDS = 5


def patient_folds(patients: np.ndarray, strata: np.ndarray, seed: int, folds: int = FOLDS) -> np.ndarray:
    """Fold of each row, [n]: all rows of a patient in one, the patients of each stratum spread evenly.

    Args:
        patients: Patient of each row, [n].
        strata: Stratum of each row, such as its class and site, [n]; a patient's first row counts.
        seed: Seed of the random order in which patients join the folds in turn.
        folds: Number of folds; at most as many as there are patients.
    """
    names, first, codes = np.unique(patients, return_index=True, return_inverse=True)
    order = np.random.default_rng([seed, 31]).permutation(len(names))
    order = order[np.argsort(strata[first][order], kind="stable")]
    fold = np.empty(len(names), int)
    fold[order] = np.arange(len(names)) % max(1, min(folds, len(names)))
    result: np.ndarray = fold[codes.reshape(-1)]
    return result


def cross_fitted(
    variants: Mapping[str, np.ndarray], folds: np.ndarray, score: Callable[[np.ndarray, np.ndarray], float]
) -> dict[str, np.ndarray]:
    """For each variant the rows that it predicts: those of the folds for which it is best on all other folds.

    Args:
        variants: Predictions by variant, [repeats, n].
        folds: Fold of each row, [n].
        score: Score of predictions [repeats, n] over the rows that a mask [n] keeps; NaN where there is none.

    Returns:
        By variant a mask [n]; the masks share no row and cover all. Of equal variants the first is chosen. Where there
        is a single fold it is chosen on its own rows.
    """
    chosen = {name: np.zeros(len(folds), bool) for name in variants}
    for fold in np.unique(folds):
        own = folds == fold
        others = ~own if not own.all() else own
        scores = {name: score(predicted, others) for name, predicted in variants.items()}
        best = max(scores, key=lambda name: -np.inf if np.isnan(scores[name]) else scores[name])
        chosen[best] |= own
    return chosen
