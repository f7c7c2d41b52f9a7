"""Estimates and their intervals by resampling patients."""

from __future__ import annotations

import math

import numpy as np

from latent_medi.statistics.intervals import (
    LEVEL,
    MIN_PATIENTS,
    NOT_ESTIMABLE,
    Estimate,
    Interval,
    wilson,
)

_LEAST_KNOWN = 0.8


class PatientResamples:
    """Bootstrap of patients: how often each patient occurs in each resample.

    One object serves a whole evaluation, so that differences between training sets are paired.

    Args:
        patients: Patient of each row, any order.
        resamples: Number of resamples B.
        seed: Seed.
    """

    def __init__(self, patients: np.ndarray, resamples: int, seed: int) -> None:
        self.names, self.codes = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
        count = len(self.names)
        rng = np.random.default_rng(seed)
        self.weights = np.zeros((resamples, 0))
        if count:
            self.weights = rng.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.float64)

    def row_weights(self, rows: np.ndarray) -> np.ndarray:
        """Weight of some of the rows given at creation (by position), [B, len(rows)]."""
        return self.weights[:, self.codes[rows]]


def interval(
    draws: np.ndarray, centre: float | None = None, lowest: float = -math.inf, highest: float = math.inf
) -> tuple[float, float] | None:
    """95 % percentile interval of bootstrap draws; NaN draws (a class lost in the resample) are left out. None where
    fewer than 20, or than four fifths of them, are left: those that are no longer speak for all.

    Args:
        draws: Bootstrap values, [B].
        centre: Shift the draws so that this is their median: resampling with repeats biases a distance upwards.
        lowest, highest: Smallest and largest value that the quantity can have.
    """
    known = draws[np.isfinite(draws)]
    if len(known) < 20 or len(known) < _LEAST_KNOWN * len(draws):
        return None
    draws = known
    shift = 0.0 if centre is None else centre - float(np.median(draws))
    low, high = np.quantile(draws + shift, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(np.clip(low, lowest, highest)), float(np.clip(high, lowest, highest))


def estimate(
    value: float | None,
    n_patches: int,
    n_patients: int,
    draws: np.ndarray | None = None,
    recentre: bool = False,
    lowest: float = -math.inf,
    highest: float = math.inf,
    smallest_group: int | None = None,
    rate: bool = False,
    reason: str | None = None,
) -> Estimate:
    """An estimate with its interval.

    Args:
        value: The number; ``None`` or NaN means not available.
        n_patches: Patches that it rests on.
        n_patients: Patients that it rests on.
        draws: Bootstrap values; without them there is no interval.
        recentre: See ``centre`` in :func:`interval`.
        lowest, highest: Smallest and largest possible value.
        smallest_group: Patients of the smallest of the groups (classes, sites, combinations) that weigh the same: the
            number is only as sure as that one. A group of one patient, who is in every resample that counts, would add
            nothing to the interval.
        rate: Whether the value is a mean of shares from 0 to 1. Where all patients have 0, or all 1, every resample
            has too; such a share gets Wilson's interval for the patients of the smallest group.
        reason: Why there is no value or no interval.
    """
    value = None if value is None or not math.isfinite(value) else float(value)
    bounds: Interval = None
    if value is not None and draws is not None:
        fewest = n_patients if smallest_group is None else min(n_patients, smallest_group)
        if fewest < MIN_PATIENTS:
            bounds = NOT_ESTIMABLE
        elif rate and value in (0.0, 1.0):
            bounds = wilson(round(value * fewest), fewest)
        else:
            bounds = interval(draws, value if recentre else None, lowest, highest) or NOT_ESTIMABLE
    smallest = None if smallest_group is None else int(smallest_group)
    return Estimate(value, int(n_patches), int(n_patients), bounds, smallest, None, reason)


class PatientTable:
    """Accuracy averaged over patients first: per class the mean over patients of the patient's mean, then over classes.

    Args:
        classes: Class code of each row.
        patients: Patient code of each row, into ``n_patients``.
        keep: Rows that count, bool.
        n_classes: Number of classes.
        n_patients: Number of patients in the resamples.
    """

    def __init__(
        self, classes: np.ndarray, patients: np.ndarray, keep: np.ndarray, n_classes: int, n_patients: int
    ) -> None:
        self.shape = (n_classes, n_patients)
        self.rows = np.flatnonzero(keep)
        self.cells = classes[self.rows] * n_patients + patients[self.rows]
        self.counts = np.bincount(self.cells, minlength=n_classes * n_patients).reshape(self.shape)
        self.present = self.counts > 0

    @property
    def n_patches(self) -> int:
        """Rows that count."""
        return len(self.rows)

    @property
    def n_patients(self) -> int:
        """Patients with a row that counts."""
        return int(self.present.any(axis=0).sum())

    @property
    def smallest_class(self) -> int:
        """Patients of the class with the fewest, of those that have a row that counts."""
        per_class = self.present.sum(axis=1)
        return int(per_class[per_class > 0].min(initial=self.n_patients))

    def mean(self, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Balanced mean of a value per row.

        Args:
            values: [n_rows], such as 1.0 where the prediction is right.
            weights: Patient weights [B, n_patients]; None weighs each patient once.

        Returns:
            [B], or [1] without weights. NaN where no row counts.
        """
        sums = np.bincount(self.cells, values[self.rows], minlength=self.counts.size).reshape(self.shape)
        per_patient = np.divide(sums, self.counts, out=np.zeros(self.shape), where=self.present)
        w = np.ones((1, self.shape[1])) if weights is None else weights
        total = w @ self.present.T
        with np.errstate(invalid="ignore", divide="ignore"):
            per_class = (w @ per_patient.T) / total
        per_class = per_class[:, self.present.any(axis=1)]
        if per_class.shape[1] == 0:
            return np.full(len(w), np.nan)
        # A resample that lost a class says nothing about the mean over classes.
        result: np.ndarray = per_class.mean(axis=1)
        return result

    def estimate(self, values: np.ndarray, weights: np.ndarray, rate: bool = False) -> Estimate:
        """The balanced mean of a value per row with its interval, over resamples [B, patients]; ``smallest_group`` is
        that of the classes, ``rate`` as in :func:`estimate`.
        """
        point, draws = float(self.mean(values)[0]), self.mean(values, weights)
        smallest = self.smallest_class
        return estimate(point, self.n_patches, self.n_patients, draws, smallest_group=smallest, rate=rate)
