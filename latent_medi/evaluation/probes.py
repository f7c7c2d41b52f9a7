"""The one linear probe that adherence and the downstream comparison share."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from latent_medi.progress import get_logger

log = get_logger(__name__)
MAX_ITER = 5000


@dataclass
class Probe:
    """A fitted probe.

    Args:
        scaler: Standardisation of the training features.
        model: The logistic regression.
        converged: Whether the optimiser reached its tolerance.
    """

    scaler: StandardScaler
    model: LogisticRegression
    converged: bool

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Predicted label of each row of [N, d]."""
        return self.model.predict(self.scaler.transform(np.asarray(features, np.float64)))


def fit_probe(
    features: np.ndarray, labels: np.ndarray, regularisation: float = 1.0, sample_weight: np.ndarray | None = None
) -> Probe:
    """StandardScaler and LogisticRegression (L-BFGS) with balanced classes: Σ loss·C + ½‖W‖².

    Classes are weighted equally, so that adding patches of a class is never rewarded for moving its prior.

    Args:
        features: [N, d].
        labels: [N], at least two different.
        regularisation: C.
        sample_weight: Weight per row; then classes are balanced only by these weights.
    """
    x = np.asarray(features, np.float64)
    scaler = StandardScaler().fit(x)
    model = LogisticRegression(
        C=regularisation, max_iter=MAX_ITER, tol=1e-4, class_weight="balanced" if sample_weight is None else None
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(scaler.transform(x), labels, sample_weight=sample_weight)
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
    if not converged:
        log.warning("A logistic regression did not converge in %d iterations.", MAX_ITER)
    return Probe(scaler, model, converged)
