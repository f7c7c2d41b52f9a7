"""Accuracy of predictions on the test patients: under shift, in distribution, seen, unseen, and by combination."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from latent_medi.evaluation.cohort.combinations import Combination, any_match, describe
from latent_medi.evaluation.cohort.study import Study, affected_sites, domain
from latent_medi.evaluation.downstream.records import Accuracies, CombinationScores, Differences
from latent_medi.statistics.differences import Draws, Scored, difference
from latent_medi.statistics.intervals import SHARE, Estimate, estimate
from latent_medi.statistics.patient_means import PatientTable


class Scorer:
    """Scores of predictions on the test patients; intervals are over these patients and over draws.

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

    @property
    def patients_by_class(self) -> dict[str, int]:
        """Test patients of each class at the affected sites."""
        counts = self.tables["accuracy_shift"].present.sum(axis=1)
        return {value: int(n) for value, n in zip(self.study.classes, counts, strict=True)}

    def scored(self, predicted: np.ndarray, draws: Draws) -> dict[str, Scored]:
        """Each of the accuracies in every repeat, from class values [repeats, n_test]."""
        right = (predicted == self.truth).astype(float)
        return {name: _scored(table, right, draws) for name, table in self.tables.items()}

    def accuracies(self, scored: Mapping[str, Scored]) -> Accuracies:
        """Accuracies of what :meth:`scored` gave."""
        return Accuracies(**{name: _share(table, scored[name]) for name, table in self.tables.items()})

    def difference(self, first: Mapping[str, Scored], second: Mapping[str, Scored]) -> Differences:
        """Paired differences first − second of what :meth:`scored` gave for two training sets."""
        return Differences(
            **{
                name: difference(first[name], second[name], table.n_patches, table.n_patients, table.smallest_class)
                for name, table in self.tables.items()
            }
        )

    def accuracy_shift(self, predicted: np.ndarray, among: np.ndarray | None = None) -> float:
        """``accuracy_shift`` of class values [repeats, n_test] over all test patches, or those that a mask [n_test]
        keeps; NaN without one under shift.
        """
        table = self.tables["accuracy_shift"] if among is None else self._table(self.shift & among)
        return table.mean((predicted == self.truth).mean(axis=0))

    def by_combination(self, predicted: np.ndarray, draws: Draws) -> list[CombinationScores]:
        """Recall and false positive rate in each held-out combination of class values [repeats, n_test]."""
        return [self._of_combination(combination, predicted, draws) for combination in self.combinations]

    def _of_combination(self, combination: Combination, predicted: np.ndarray, draws: Draws) -> CombinationScores:
        value = combination[self.study.class_field]
        there = self.study.having(domain(self.study, combination))[self.study.test]
        of_class, called = self.truth == value, (predicted == value).astype(float)

        def share(keep: np.ndarray, by_class: bool) -> Estimate:
            table = self._table(keep, by_class)
            return _share(table, _scored(table, called, draws))

        return CombinationScores(
            describe(combination),
            combination,
            recall=share(there & of_class, True),
            false_positive_rate=share(there & ~of_class, False),
        )


def _scored(table: PatientTable, values: np.ndarray, draws: Draws) -> Scored:
    """The balanced mean of values per repeat and row, [repeats, n_test]."""
    means = np.array([table.mean(one) for one in values])
    return Scored(draws, means, np.stack([table.left_out(one) for one in values]), table.strata)


def _share(table: PatientTable, scored: Scored) -> Estimate:
    """Mean over repeats, with its interval over patients and draws."""
    return estimate(
        scored.value,
        table.n_patches,
        table.n_patients,
        scored.spread,
        SHARE,
        table.smallest_class,
        scored.draws.unknown,
    )
