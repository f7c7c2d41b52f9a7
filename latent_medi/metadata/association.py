"""How strongly class and other fields depend on one another, over patients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from latent_medi.metadata.estimability import missing

LEAST_PATIENTS = 10
"""Patients of a class, or of all, below which a field is neither said to separate classes nor to repeat them."""
REPEATS = 0.98
"""Cramér's V from which a field repeats the class."""


def cramers_v(index: pd.DataFrame, first: str, second: str) -> float | None:
    """Cramér's V of two categorical columns over patients, corrected for its bias (Bergsma 2013, J. Korean Stat. Soc.
    42, 323-328, equations 7 to 9): without the correction, V of independent fields grows with their numbers of values.

    A patient counts once for each pair of values; unknown values are left out.

    Returns:
        From 0 (independent, or no more dependent than chance makes fields of so many values) to 1 (one determines the
        other); ``None`` if either column is constant or has a value of its own for each patient.
    """
    from scipy.stats.contingency import association  # which takes longer than all else that its callers import

    known = index[~missing(index[first]) & ~missing(index[second])].drop_duplicates(["patient", first, second])
    table = pd.crosstab(known[first], known[second]).to_numpy()
    rows, columns = table.shape
    if min(rows, columns) < 2:
        return None
    others = int(table.sum()) - 1
    mean_square = min(rows, columns) - 1.0  # φ² = χ²/n
    mean_square *= float(association(table, method="cramer")) ** 2
    left = min(size - 1 - (size - 1) ** 2 / others for size in (rows, columns))
    if left <= 1e-9:
        return None
    return min(1.0, float(np.sqrt(max(0.0, mean_square - (rows - 1) * (columns - 1) / others) / left)))


def repeats_class(index: pd.DataFrame, class_field: str, name: str) -> str:
    """Whether a field repeats the class: ``"both"`` determine one another, ``"class"`` or ``"field"`` says which one
    determines the other; ``""`` if neither does, or there are fewer than ten patients."""
    known = index[~missing(index[class_field]) & ~missing(index[name])].drop_duplicates(["patient", class_field, name])
    association = cramers_v(known, class_field, name)
    if association is None or association < REPEATS or known["patient"].nunique() < LEAST_PATIENTS:
        return ""
    table = pd.crosstab(known[class_field], known[name]).to_numpy()
    by_class, by_field = (table.max(axis=axis).sum() / table.sum() >= REPEATS for axis in (1, 0))
    return "both" if by_class and by_field else "class" if by_class else "field" if by_field else ""


def class_separation(index: pd.DataFrame, class_field: str, name: str) -> dict[str, Any] | None:
    """The two classes that a continuous field separates best, by its patients' means.

    Returns:
        ``classes`` (the one with the larger values first), ``auroc`` (0.5 to 1: how often a patient of the first has a
        larger value than one of the second) and ``patients`` of each; ``None`` unless two classes have ten patients.
    """
    known = index[~missing(index[class_field]) & ~missing(index[name])]
    means = known.groupby(["patient", class_field], observed=True)[name].mean().reset_index()
    counts = pd.crosstab(means[name], means[class_field])  # a row per number, in order; a column per class
    counts = counts.loc[:, counts.sum() >= LEAST_PATIENTS]
    if counts.shape[1] < 2:
        return None
    numbers = counts.to_numpy(float)
    shares = numbers / numbers.sum(axis=0)
    above = shares.T @ (shares.cumsum(axis=0) - shares / 2)  # [class, class], equal numbers count half
    first, second = (int(at) for at in np.unravel_index(above.argmax(), above.shape))
    names, people = [str(value) for value in counts.columns], numbers.sum(axis=0).astype(int).tolist()
    return {
        "classes": [names[first], names[second]],
        "auroc": float(above[first, second]),
        "patients": [people[first], people[second]],
    }
