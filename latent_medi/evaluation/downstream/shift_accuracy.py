"""Accuracy of predictions on the test patients: under shift, in distribution, seen, unseen, and by combination."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from latent_medi.evaluation.cohort.combinations import Combination, any_match, describe
from latent_medi.evaluation.cohort.study import Study, affected_sites, domain
from latent_medi.evaluation.downstream.records import Accuracies, CombinationScores
from latent_medi.statistics.intervals import Estimate
from latent_medi.statistics.patient_means import PatientTable


class Scorer:
    """Scores of predictions on the test patients; intervals are over these patients, differences are paired.

    Args:
        study: The cohort.
        combinations: Held-out combinations, each with a class.

    Attributes:
        truth: Class of each test patch.
        codes: Its code.
        patients: Patient code of each test patch.
        shift: Which test patches come from a site with a held-out combination.
        tables: By field of :class:`Accuracies` the patches that count.
    """

    def __init__(self, study: Study, combinations: Sequence[Combination]) -> None:
        self.study, self.combinations = study, list(combinations)
        self.truth = study.class_labels[study.test]
        codes = {value: i for i, value in enumerate(study.classes)}
        self.codes = np.array([codes[value] for value in self.truth])
        names, self.patients = np.unique(study.patients[study.test], return_inverse=True)
        self.n_patients = len(names)
        held = any_match(study.index, study.held_out)[study.test]
        self.affected_sites = sorted(affected_sites(study))
        self.shift = np.isin(study.site_labels[study.test], self.affected_sites)
        parts = (self.shift, ~self.shift, ~held, held)  # in the order of the record's fields
        fields = dataclasses.fields(Accuracies)
        self.tables = {field.name: self._table(keep) for field, keep in zip(fields, parts, strict=True)}

    def _table(self, keep: np.ndarray, by_class: bool = True) -> PatientTable:
        codes = self.codes if by_class else np.zeros_like(self.codes)
        classes = len(self.study.classes) if by_class else 1
        return PatientTable(codes, self.patients, keep, classes, self.n_patients)

    def accuracies(self, predicted: np.ndarray) -> Accuracies:
        """Accuracies of class values [repeats, n_test]."""
        return self._accuracies(self._correct(predicted), share=True)

    def difference(self, a: np.ndarray, b: np.ndarray) -> Accuracies:
        """Paired differences a − b of the accuracies of two predictions, each [repeats, n_test]."""
        return self._accuracies(self._correct(a) - self._correct(b), share=False)

    def _correct(self, predicted: np.ndarray) -> np.ndarray:
        """Share of repeats with the right class, [n_test]."""
        return np.asarray((predicted == self.truth).mean(axis=0))

    def _accuracies(self, values: np.ndarray, share: bool) -> Accuracies:
        return Accuracies(**{name: table.estimate(values, share) for name, table in self.tables.items()})

    def accuracy_shift(self, predicted: np.ndarray) -> float:
        """``accuracy_shift`` of class values [repeats, n_test], or [n_test]; NaN without test patches under shift."""
        return self.tables["accuracy_shift"].mean(self._correct(np.atleast_2d(predicted)))

    def by_combination(self, predicted: np.ndarray) -> list[CombinationScores]:
        """Recall and false positive rate in each held-out combination of class values [repeats, n_test]."""
        return [self._of_combination(combination, predicted) for combination in self.combinations]

    def _of_combination(self, combination: Combination, predicted: np.ndarray) -> CombinationScores:
        value = combination[self.study.class_field]
        there = self.study.having(domain(self.study, combination))[self.study.test]
        of_class = self.truth == value
        called = (predicted == value).mean(axis=0)

        def share(keep: np.ndarray, values: np.ndarray, by_class: bool) -> Estimate:
            return self._table(keep, by_class).estimate(values, share=True)

        return CombinationScores(
            describe(combination),
            combination,
            recall=share(there & of_class, self._correct(predicted), True),
            false_positive_rate=share(there & ~of_class, called, False),
        )
