"""Classifiers behind one call: a lesson in, labels and probabilities of the test patches out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.training_sets import Lesson
from latent_medi.statistics.linear_probe import choose_regularisation, fine_tune_linear_probe, fit_linear_probe


@dataclass
class Learned:
    """What a classifier says of the test patches.

    Args:
        predicted: Class value of each, [n_test].
        probabilities: Of each class, in the order of the study's classes, [n_test, K]; rows sum to 1.
        converged: Whether the optimiser reached its tolerance.
    """

    predicted: np.ndarray
    probabilities: np.ndarray
    converged: bool


class Learner(Protocol):
    """Learns from lessons and judges the test patches.

    Attributes:
        about: What a reader must know to make the numbers again, for metrics.json.
        random: Whether the same lesson gives another classifier with another seed.
    """

    about: dict[str, Any]
    random: bool

    def learn(self, lesson: Lesson, seed: int) -> Learned:
        """Train on a lesson and judge the test patches."""
        ...


class ProbeLearner:
    """The linear probe on frozen features.

    Args:
        test: Features of the test patches, [n_test, d].
        classes: Class values in the order of the probabilities.
        regularisation: C, the same for every arm.
        about: How C came about.
    """

    random = False

    def __init__(
        self, test: np.ndarray, classes: Sequence[str], regularisation: float, about: dict[str, Any] | None = None
    ) -> None:
        self.test, self.classes, self.regularisation = test, list(classes), regularisation
        self.about = {"classifier": "probe", "regularisation": about or {"value": regularisation, "chosen": False}}

    def learn(self, lesson: Lesson, seed: int) -> Learned:
        """Train on a lesson and judge the test patches; the seed has no part in it."""
        if lesson.first is not None:
            probe = fine_tune_linear_probe(lesson.first, lesson.features, lesson.labels, self.regularisation)
        else:
            probe = fit_linear_probe(lesson.features, lesson.labels, self.regularisation, lesson.weights)
        return Learned(
            probe.predict(self.test).astype(str), probe.probabilities(self.test, self.classes), probe.converged
        )


def probe_learner(study: Study, real: np.ndarray, regularisation: float, seed: int) -> ProbeLearner:
    """The probe with a given C, or with one chosen on the real training patches alone.

    Args:
        study: The cohort.
        real: Features of every real row, [N, d].
        regularisation: C; 0 chooses it.
        seed: Seed of the folds.
    """
    about = None
    if regularisation == 0:
        rows = study.train
        labels, sites = (study.index[f].to_numpy(str)[rows] for f in (study.class_field, study.site_field))
        choice = choose_regularisation(real[rows], labels, study.patients[rows], sites, seed)
        about, regularisation = asdict(choice), choice.value
    return ProbeLearner(real[study.test], study.classes, regularisation, about)
