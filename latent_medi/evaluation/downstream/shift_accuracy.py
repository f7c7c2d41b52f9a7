"""Scores of predictions on the test patients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from latent_medi.evaluation.cohort.combinations import Combination, any_match, describe, matches
from latent_medi.evaluation.cohort.study import Study, affected_sites, domain
from latent_medi.evaluation.downstream.classification_scores import Levels
from latent_medi.statistics.bootstrap import PatientResamples, PatientTable

HEADLINE = "accuracy_shift"


class Scorer:
    """Scores of predictions on the test patients; all intervals and differences share one patient bootstrap."""

    def __init__(self, study: Study, cells: Sequence[Combination], resamples: int, seed: int) -> None:
        self.study, self.cells = study, list(cells)
        index = study.index
        self.truth = index[study.class_field].to_numpy(str)[study.test]
        classes = {v: i for i, v in enumerate(study.classes)}
        self.codes = np.array([classes[v] for v in self.truth])
        self.bootstrap = PatientResamples(study.patients[study.test], resamples, seed)
        sites = index[study.site_field].to_numpy(str)[study.test]
        held = any_match(index, study.held_out)[study.test]
        self.affected = sorted(affected_sites(study))
        shift = np.isin(sites, self.affected)
        self.levels = Levels(study, self.codes, shift, self.bootstrap)
        self.tables = {
            HEADLINE: self._table(shift),
            "accuracy_in_distribution": self._table(~shift),
            "accuracy_seen": self._table(~held),
            "accuracy_unseen": self._table(held),
        }
        self.recalls, self.alarms = [], []
        for cell in self.cells:
            here = matches(index, domain(study, cell))[study.test]
            of_class = self.truth == cell[study.class_field]
            self.recalls.append(self._table(here & of_class))
            self.alarms.append(self._table(here & ~of_class, one_group=True))

    def _table(self, keep: np.ndarray, one_group: bool = False) -> PatientTable:
        codes = np.zeros_like(self.codes) if one_group else self.codes
        groups = 1 if one_group else len(self.study.classes)
        return PatientTable(codes, self.bootstrap.codes, keep, groups, len(self.bootstrap.names))

    def score(self, predicted: np.ndarray, probabilities: np.ndarray | None = None) -> dict[str, Any]:
        """Measures of an arm.

        Args:
            predicted: Class values, [repeats, n_test].
            probabilities: Mean over repeats of the class probabilities, [n_test, K]; gives the entry ``scores``.
        """
        right = (predicted == self.truth).mean(axis=0)
        weights = self.bootstrap.weights
        result: dict[str, Any] = {name: t.measure(right, weights, rate=True) for name, t in self.tables.items()}
        result[HEADLINE]["by_repeat"] = [
            float(self.tables[HEADLINE].mean((p == self.truth).astype(float))[0]) for p in predicted
        ]
        result["cells"] = []
        for cell, recall, alarm in zip(self.cells, self.recalls, self.alarms, strict=True):
            false = (predicted == cell[self.study.class_field]).mean(axis=0)
            result["cells"].append(
                {
                    "name": describe(cell),
                    "combination": cell,
                    "recall": recall.measure(right, weights, rate=True),
                    "false_positive_rate": alarm.measure(false, weights, rate=True),
                }
            )
        if probabilities is not None:
            result["scores"] = self.levels.score(probabilities)
        return result

    def headline(self, predicted: np.ndarray) -> float:
        """``accuracy_shift`` of predictions [repeats, n_test]; NaN without test patches under shift."""
        return float(self.tables[HEADLINE].mean((predicted == self.truth).mean(axis=0))[0])

    def difference(self, a: np.ndarray, b: np.ndarray, name: str = HEADLINE) -> dict[str, Any]:
        """Paired difference a − b of a score, with the interval over patients; arguments as in :meth:`score`."""
        table = self.tables[name]
        delta = (a == self.truth).mean(axis=0) - (b == self.truth).mean(axis=0)
        return table.measure(delta, self.bootstrap.weights)
