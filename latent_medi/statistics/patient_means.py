"""Means over patients first, then over classes, with their variance over patients."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from latent_medi.statistics.intervals import SHARE, Estimate, Spread, estimate, jackknife, strata_of


class PatientTable:
    """Balanced mean: per class the mean over patients of the patient's mean, then over classes.

    Args:
        classes: Class code of each row.
        patients: Patient code of each row, into ``n_patients``.
        keep: Rows that count, bool.
        n_classes: Number of classes.
        n_patients: Number of patients in all.
    """

    def __init__(
        self, classes: np.ndarray, patients: np.ndarray, keep: np.ndarray, n_classes: int, n_patients: int
    ) -> None:
        self.shape = (n_classes, n_patients)
        self.rows = np.flatnonzero(keep)
        self.cells = classes[self.rows] * n_patients + patients[self.rows]
        self.counts = np.bincount(self.cells, minlength=n_classes * n_patients).reshape(self.shape)
        self.present = self.counts > 0

    @classmethod
    def of_one_group(cls, patients: np.ndarray, keep: np.ndarray) -> PatientTable:
        """A table whose mean is that over patients, from the patient of each row and which rows count."""
        names, codes = np.unique(patients, return_inverse=True)
        return cls(np.zeros(len(codes), int), codes, keep, 1, len(names))

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

    @cached_property
    def strata(self) -> np.ndarray:
        """The independent sample of each patient with a row that counts, [n_patients]: see :func:`strata_of`."""
        return strata_of(self.present[:, self.present.any(axis=0)])

    def patient_means(self, values: np.ndarray) -> np.ndarray:
        """Mean of a value per row by class and patient, [n_classes, n_patients]; 0 where there is no row."""
        sums = np.bincount(self.cells, values[self.rows], minlength=self.counts.size).reshape(self.shape)
        return np.divide(sums, self.counts, out=np.zeros(self.shape), where=self.present)

    def mean(self, values: np.ndarray) -> float:
        """Balanced mean of a value per row, such as 1.0 where the prediction is right, [n_rows]; NaN without a row."""
        here = self.present.any(axis=1)
        if not here.any():
            return float("nan")
        return float((self.patient_means(values)[here].sum(axis=1) / self.present[here].sum(axis=1)).mean())

    def left_out(self, values: np.ndarray) -> np.ndarray:
        """The balanced mean without each patient that has a row that counts, in order of their codes, [n_patients].

        NaN for the only patient of a class.
        """
        here, who = self.present.any(axis=1), self.present.any(axis=0)
        if not here.any():
            return np.zeros(0)
        means, present = self.patient_means(values)[here][:, who], self.present[here][:, who]
        rest = present.sum(axis=1, keepdims=True) - present
        totals = means.sum(axis=1, keepdims=True) - means
        result: np.ndarray = np.divide(totals, rest, out=np.full(totals.shape, np.nan), where=rest > 0).mean(axis=0)
        return result

    def spread(self, values: np.ndarray) -> Spread:
        """Variance over patients of the balanced mean of a value per row."""
        return jackknife(self.left_out(values), self.strata)

    def estimate(self, values: np.ndarray, share: bool = False) -> Estimate:
        """The balanced mean of a value per row with its interval; ``share`` if the values are from 0 to 1."""
        within = SHARE if share else None
        return estimate(
            self.mean(values), self.n_patches, self.n_patients, self.spread(values), within, self.smallest_class
        )
