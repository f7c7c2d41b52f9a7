"""Scores of a classification from its confusion table, per class and averaged, and without each patient in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from latent_medi.statistics.left_out import Score

RATES = ("sensitivity", "specificity", "precision", "f1")
"""Rates of each class against the rest."""


@dataclass(frozen=True)
class ClassRates:
    """Each class against the rest; NaN where a class is not in the truth.

    Args:
        sensitivity: Share of a class's rows that are found, [..., K].
        specificity: Share of the other rows that are not taken for it, [..., K]; NaN without other rows.
        precision: Share of the rows taken for a class that are of it, [..., K]; 0 where there is none.
        f1: Harmonic mean of sensitivity and precision, [..., K].
    """

    sensitivity: np.ndarray
    specificity: np.ndarray
    precision: np.ndarray
    f1: np.ndarray


def confusion_table(truth: np.ndarray, found: np.ndarray, n_classes: int) -> np.ndarray:
    """Rows by true class (axis 0) and predicted class (axis 1), int [K, K], of two codes per row, [N]."""
    return np.bincount(truth * n_classes + found, minlength=n_classes**2).reshape(n_classes, n_classes)


def class_rates(tables: np.ndarray) -> ClassRates:
    """Rates of confusion tables, [..., K, K]."""
    right = np.diagonal(tables, axis1=-2, axis2=-1)
    actual, called = tables.sum(axis=-1), tables.sum(axis=-2)
    negatives = tables.sum(axis=(-2, -1))[..., None] - actual
    there = actual > 0

    def rate(above: np.ndarray, below: np.ndarray, absent: float) -> np.ndarray:
        found = np.divide(above, below, out=np.full(above.shape, absent), where=below > 0)
        return np.where(there, found, np.nan)

    return ClassRates(
        rate(right, actual, np.nan),
        rate(negatives - (called - right), negatives, np.nan),
        rate(right, called, 0.0),
        rate(2 * right, actual + called, np.nan),
    )


def macro_scores(truth: np.ndarray, found: np.ndarray) -> tuple[float, float, float, float]:
    """Accuracy; and F1, sensitivity and specificity averaged over the classes present in the truth.

    Args:
        truth: Class of each row, [N]; any sortable values.
        found: Predicted class of each row, [N].
    """
    names, codes = np.unique(np.concatenate([truth, found]), return_inverse=True)
    table = confusion_table(codes[: len(truth)], codes[len(truth) :], len(names))
    rates, there = class_rates(table), table.sum(axis=1) > 0
    means = (float(rate[there].mean()) for rate in (rates.f1, rates.sensitivity, rates.specificity))
    return (float(np.trace(table) / table.sum()), *means)  # type: ignore[return-value]


@dataclass(frozen=True)
class ConfusionScores:
    """Accuracy over rows, and rates, each with its values without each patient.

    Args:
        accuracy: Share of rows that are right.
        macro: By name of :data:`RATES`, the mean over the classes present in the truth.
        classes: By name of :data:`RATES`, the score of each class, K.
    """

    accuracy: Score
    macro: dict[str, Score]
    classes: dict[str, list[Score]]


def confusion_scores(truth: np.ndarray, found: np.ndarray, n_classes: int, patients: np.ndarray) -> ConfusionScores:
    """Scores of all rows, and without each patient's.

    Args:
        truth: Class code of each row, [N].
        found: Predicted code of each row, [N].
        n_classes: K.
        patients: Code of the patient of each row, [N], from 0, of which each occurs.
    """
    n_patients, cells = int(patients.max()) + 1, n_classes**2
    own = np.bincount(patients * cells + truth * n_classes + found, minlength=n_patients * cells)
    own = own.reshape(n_patients, n_classes, n_classes)
    table = own.sum(axis=0)
    rest = table - own
    left = np.trace(rest, axis1=1, axis2=2) / np.where(rest.sum(axis=(1, 2)) > 0, rest.sum(axis=(1, 2)), np.nan)
    everything, without, there = class_rates(table), class_rates(rest), table.sum(axis=1) > 0
    macro, classes = {}, {}
    for name in RATES:
        one, many = getattr(everything, name), getattr(without, name)
        macro[name] = Score(float(one[there].mean()), many[:, there].mean(axis=1))
        classes[name] = [Score(float(one[k]), many[:, k]) for k in range(n_classes)]
    return ConfusionScores(Score(float(np.trace(table) / table.sum()), left), macro, classes)
