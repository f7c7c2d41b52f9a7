"""Downstream classifiers: each is trained on a training set and predicts the real test patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np

from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.records import ClassifierRecord
from latent_medi.evaluation.downstream.training_sets import TrainingSet
from latent_medi.statistics.linear_probe import (
    LinearProbe,
    choose_regularisation,
    fine_tune_linear_probe,
    fit_linear_probe,
)


@dataclass
class Prediction:
    """A classifier's answer for the test patches.

    Args:
        predicted: Class value of each, [n_test].
        probabilities: Of each class, in the order of the study's classes, [n_test, K]; rows sum to 1.
        converged: Whether the optimiser reached its tolerance.
    """

    predicted: np.ndarray
    probabilities: np.ndarray
    converged: bool


class Classifier(Protocol):
    """A downstream classifier.

    Attributes:
        record: Its settings, for metrics.json.
        random: Whether the same training set gives another classifier with another seed.
    """

    record: ClassifierRecord
    random: bool

    def fit_predict(self, training_set: TrainingSet, seed: int) -> Prediction:
        """Train from scratch and predict the test patches."""
        ...


class LinearProbeClassifier:
    """The linear probe on frozen features.

    Args:
        test: Features of the test patches, [n_test, d].
        classes: Class values in the order of the probabilities.
        regularisation: C, the same for every training set.
        chosen: How C was chosen; None if it was given.
        device: Torch device of the fits.
        start: Features and labels of the real training patches, which every training set has: fits start from theirs.
    """

    random = False

    def __init__(
        self,
        test: np.ndarray,
        classes: Sequence[str],
        regularisation: float,
        chosen: dict[str, object] | None = None,
        device: str = "cpu",
        start: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.device, self._first = device, start
        self._start: LinearProbe | None = None
        self.test, self.classes, self.regularisation = test, list(classes), regularisation
        self.record = ClassifierRecord("linear", chosen or {"value": regularisation, "chosen": False})

    def fit_predict(self, training_set: TrainingSet, seed: int) -> Prediction:
        """Train from scratch and predict the test patches; the result does not depend on the seed."""
        x, labels = training_set.features, training_set.labels
        if training_set.pretraining is not None:
            probe = fine_tune_linear_probe(training_set.pretraining, x, labels, self.regularisation, device=self.device)
        else:
            probe = self._fit(x, labels, training_set.weights)
        return Prediction(
            probe.predict(self.test).astype(str), probe.probabilities(self.test, self.classes), probe.converged
        )

    def _fit(self, x: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> LinearProbe:
        """Every fit starts from that of the real training patches, and from no other: their order does not matter."""
        if self._first is not None and len(np.unique(self._first[1])) > 1:
            self._start = fit_linear_probe(*self._first, self.regularisation, device=self.device)
        self._first = None
        return fit_linear_probe(x, labels, self.regularisation, weights, start=self._start, device=self.device)


def linear_probe_classifier(
    study: Study, real: np.ndarray, regularisation: float, seed: int, device: str = "cpu"
) -> LinearProbeClassifier:
    """The linear probe with a given C, or with one chosen on the real training patches alone.

    Args:
        study: The cohort.
        real: Features of every real row, [N, d].
        regularisation: C; 0 chooses it by cross-validation.
        seed: Seed of the folds.
        device: Torch device of the fits.
    """
    chosen, rows = None, study.train
    if regularisation == 0:
        choice = choose_regularisation(
            real[rows], study.class_labels[rows], study.patients[rows], study.site_labels[rows], seed
        )
        chosen, regularisation = asdict(choice), choice.value
    first = real[rows], study.class_labels[rows]
    return LinearProbeClassifier(real[study.test], study.classes, regularisation, chosen, device, first)
