"""Linear probes: the one that adherence and the downstream comparison share, and how its regularisation is chosen; and
the probe of a field that selection judges by.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from latent_medi.core.progress import get_logger
from latent_medi.statistics.additive_effects import patient_weights
from latent_medi.statistics.bootstrap import PatientTable
from latent_medi.statistics.distances import BLOCK

log = get_logger(__name__)
MAX_ITER = 5000
C_GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
_FOLDS = 5
_MAX_TRAINING = 20_000  # rows that take part in the choice of C
_MIN_SITES = 3  # with fewer, leaving a site out leaves one that cannot stand for "several hospitals"
REGULARISATIONS = (0.001, 0.01, 0.1, 1.0)
"""Values of C that the cross-validation of a field's probe chooses from."""
FOLDS = 3


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

    def probabilities(self, features: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """Probability of each class, [N, len(classes)]; 0 for a class that the probe has not seen."""
        found = self.model.predict_proba(self.scaler.transform(np.asarray(features, np.float64)))
        known = {str(c): i for i, c in enumerate(self.model.classes_)}
        return np.stack([found[:, known[c]] if c in known else np.zeros(len(found)) for c in classes], axis=1)


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    regularisation: float = 1.0,
    sample_weight: np.ndarray | None = None,
    scaler: StandardScaler | None = None,
) -> Probe:
    """StandardScaler and LogisticRegression (L-BFGS) with balanced classes: Σ loss·C + ½‖W‖².

    Classes are weighted equally, so that adding patches of a class is never rewarded for moving its prior.

    Args:
        features: [N, d].
        labels: [N], at least two different.
        regularisation: C.
        sample_weight: Weight per row; then classes are balanced only by these weights.
        scaler: Standardisation of other patches, instead of one fitted to these.
    """
    x = np.asarray(features, np.float64)
    scaler = scaler or StandardScaler().fit(x)
    model = LogisticRegression(
        C=regularisation, max_iter=MAX_ITER, tol=1e-4, class_weight="balanced" if sample_weight is None else None
    )
    converged = fit_quietly(model, scaler.transform(x), labels, sample_weight)
    return Probe(scaler, model, converged)


def fit_quietly(
    model: LogisticRegression, x: np.ndarray, labels: np.ndarray, sample_weight: np.ndarray | None = None
) -> bool:
    """Fit a logistic regression; whether it converged. What did not is logged."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, labels, sample_weight=sample_weight)
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
    if not converged:
        log.warning("A logistic regression did not converge in %d iterations.", model.max_iter)
    return converged


def fine_tune_probe(
    first: tuple[np.ndarray, np.ndarray], features: np.ndarray, labels: np.ndarray, regularisation: float = 1.0
) -> Probe:
    """A probe pre-trained on some patches and fine-tuned on others.

    The pre-trained weights W₀ are those of :func:`fit_probe` on the first patches; fine-tuning starts there and
    minimises Σ loss·C + ½‖W − W₀‖² over the second, so it leaves W₀ only where they say so. A class that the first
    patches lack starts from zero. Both use the standardisation of the second patches. Without first patches, this is
    :func:`fit_probe`.

    Args:
        first: Features [M, d] and labels [M] to learn from first; fewer than two classes count as none.
        features: [N, d] to fine-tune on.
        labels: [N], at least two different.
        regularisation: C, the same for both.
    """
    if len(np.unique(first[1])) < 2:
        return fit_probe(features, labels, regularisation)
    x = np.asarray(features, np.float64)
    scaler = StandardScaler().fit(x)
    before = fit_probe(first[0], first[1], regularisation, scaler=scaler)
    classes = np.unique(labels)
    start = np.zeros((len(classes), x.shape[1] + 1))
    rows = _symmetric(before.model)
    for i, value in enumerate(before.model.classes_):
        if value in classes:
            start[np.searchsorted(classes, value)] = rows[i]
    weights, converged = _towards(scaler.transform(x), np.searchsorted(classes, labels), start, regularisation)
    model = LogisticRegression(C=regularisation, max_iter=MAX_ITER)
    model.classes_, model.n_features_in_ = classes, x.shape[1]
    model.coef_, model.intercept_ = weights[:, :-1], weights[:, -1]
    if not converged:
        log.warning("Fine-tuning a logistic regression did not converge in %d iterations.", MAX_ITER)
    return Probe(scaler, model, before.converged and converged)


def _symmetric(model: LogisticRegression) -> np.ndarray:
    """Weights with the intercept last, a row per class, also where scikit-learn keeps one row for two classes."""
    rows = np.column_stack([model.coef_, model.intercept_])
    return np.concatenate([-rows / 2, rows / 2]) if len(rows) == 1 else rows


def _towards(x: np.ndarray, codes: np.ndarray, start: np.ndarray, regularisation: float) -> tuple[np.ndarray, bool]:
    """Minimise Σ loss·C + ½‖W − W₀‖² with balanced classes; the intercept is free, as in scikit-learn.

    Args:
        x: Standardised features, [N, d].
        codes: Class of each row, [N].
        start: W₀ with the intercept last, [K, d + 1].
        regularisation: C.

    Returns:
        Weights in scikit-learn's form ([1, d + 1] for two classes), and whether the optimiser converged.
    """
    if len(start) == 2:  # one row, the difference: its penalty is what scikit-learn's is
        start = start[1:] - start[:1]
    count = max(len(start), 2)
    design = np.column_stack([x, np.ones(len(x))])
    balance = compute_sample_weight("balanced", codes)
    scale = 1.0 / (regularisation * balance.sum())
    target = np.eye(count)[codes]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w = flat.reshape(start.shape)
        logits = design @ w.T
        if len(w) == 1:
            logits = np.column_stack([np.zeros(len(x)), logits])
        logs = log_softmax(logits, axis=1)
        move = w - start
        move[:, -1] = 0.0
        value = -(balance * logs[np.arange(len(x)), codes]).sum() / balance.sum() + 0.5 * scale * (move**2).sum()
        slope = ((np.exp(logs) - target) * (balance / balance.sum())[:, None])[:, -len(w) :]
        return float(value), (slope.T @ design + scale * move).ravel()

    options = {"maxiter": MAX_ITER, "gtol": 1e-6, "ftol": 1e-12, "maxfun": 10 * MAX_ITER}
    result = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B", options=options)
    # Status 1 is a limit reached; a line search that finds nothing better (2) has arrived as far as rounding goes.
    return result.x.reshape(start.shape), result.status != 1


def choose_regularisation(
    features: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    sites: np.ndarray,
    seed: int,
    grid: Sequence[float] = C_GRID,
) -> dict[str, Any]:
    """C of the probe by cross-validation over patients, and over sites where there are three or more.

    Only training patches may be given. With three or more sites each fold judges sites that it has not learnt from (up
    to five folds), and its patients' patches elsewhere are left out of its training; with fewer, each fold judges
    patients. The score is the balanced accuracy over classes of patient means; of equal ones the stronger
    regularisation wins.

    Args:
        features: [N, d].
        labels: [N].
        patients: Patient of each row, [N].
        sites: Site of each row, [N].
        seed: Seed of the folds, and of the subsample of patients beyond 20,000 rows.
        grid: Candidates, ascending.

    Returns:
        ``value``, ``chosen`` (False if no fold could be made: 1.0 then), ``over`` ("sites" or "patients"), ``folds``,
        ``grid``, ``scores`` (mean over folds per candidate), ``n_patches`` and ``n_patients``.
    """
    rows = np.arange(len(labels))
    if len(rows) > _MAX_TRAINING:
        names, first = np.unique(patients, return_inverse=True)
        order = np.random.default_rng([seed, 23]).permutation(len(names))[first]
        rows = np.sort(np.argsort(order, kind="stable")[:_MAX_TRAINING])
    x, y, who, where = (np.asarray(v)[rows] for v in (features, labels, patients, sites))
    over, folds = _folds(y, who, where, seed)
    classes, codes = np.unique(y, return_inverse=True)
    names, people = np.unique(who, return_inverse=True)
    scores = np.full((len(folds), len(grid)), np.nan)
    for i, (learn, judge) in enumerate(folds):
        table = PatientTable(codes, people, np.isin(np.arange(len(y)), judge), len(classes), len(names))
        for j, c in enumerate(grid):
            right = np.zeros(len(y))
            right[judge] = fit_probe(x[learn], y[learn], c).predict(x[judge]) == y[judge]
            scores[i, j] = table.mean(right)[0]
    mean = scores.mean(axis=0) if len(folds) else np.full(len(grid), np.nan)
    return {
        "value": float(grid[int(np.argmax(mean))]) if len(folds) else 1.0,
        "chosen": bool(len(folds)),
        "over": over,
        "folds": len(folds),
        "grid": list(grid),
        "scores": mean.tolist(),
        "n_patches": len(rows),
        "n_patients": len(names),
    }


def _folds(
    labels: np.ndarray, patients: np.ndarray, sites: np.ndarray, seed: int
) -> tuple[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Rows to learn from and rows to judge, of other patients, per fold; folds with one class to learn are left out."""
    rows = np.arange(len(labels))
    n_sites, n_patients = len(np.unique(sites)), len(np.unique(patients))

    def usable(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        apart = [(learn[~np.isin(patients[learn], patients[judge])], judge) for learn, judge in pairs]
        return [(a, b) for a, b in apart if len(b) and len(np.unique(labels[a])) >= 2]

    if n_sites >= _MIN_SITES:
        wanted = min(_FOLDS, n_sites)
        folds = usable(GroupKFold(wanted).split(rows, labels, sites))
        # Patients with patches at several sites leave little to learn from once they are taken out.
        if len(folds) == wanted and min(len(learn) for learn, _ in folds) >= len(rows) / 3:
            return "sites", folds
    # Also where patients with patches at every site leave nothing to learn from.
    folds = []
    if n_patients >= 2:
        splitter = StratifiedGroupKFold(min(_FOLDS, n_patients), shuffle=True, random_state=seed)
        with warnings.catch_warnings():  # a class with fewer patches than folds is in some folds only, which is fine
            warnings.simplefilter("ignore", UserWarning)
            folds = usable(splitter.split(rows, labels, patients))
    return "patients", folds


@dataclass
class FieldProbe:
    """A probe of one field.

    Args:
        values: Values that it tells apart, in order.
        scaler: Standardisation of the training features.
        model: The logistic regression.
        regularisation: C.
        accuracy: Out of fold: mean over values of the mean over their patients, 0 to 1.
        n_patches, n_patients: What it learned from.
        converged: Whether every optimisation reached its tolerance.
    """

    values: list[str]
    scaler: StandardScaler
    model: LogisticRegression
    regularisation: float
    accuracy: float
    n_patches: int
    n_patients: int
    converged: bool

    def log_probability(self, features: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Log probability of the value asked for, float64 [N], exact for probabilities next to 1.

        Args:
            features: [N, d].
            asked: One of ``values`` for each.
        """
        result = np.empty(len(features))
        for start in range(0, len(features), BLOCK):
            part = slice(start, start + BLOCK)
            result[part] = _log_probability(self.model, self.scaler, features[part], asked[part])
        return result


def _log_probability(
    model: LogisticRegression, scaler: StandardScaler, features: np.ndarray, asked: np.ndarray
) -> np.ndarray:
    scores = model.decision_function(scaler.transform(np.asarray(features, np.float64)))
    if scores.ndim == 1:  # two values: the score is the log odds of the second
        scores = np.stack([np.zeros(len(scores)), scores], 1)
    codes = {value: i for i, value in enumerate(model.classes_)}
    own = np.array([codes.get(value, -1) for value in asked])
    rows = np.arange(len(own))
    others = scores.copy()
    others[rows, own] = -np.inf
    largest = others.max(axis=1, keepdims=True)
    rest = largest[:, 0] + np.log(np.exp(others - largest).sum(axis=1))
    # A value that a fold never saw has no score: next to impossible.
    return np.where(own >= 0, -np.logaddexp(0.0, rest - scores[rows, own]), -50.0)


def fit_field_probe(
    features: np.ndarray, labels: np.ndarray, patients: np.ndarray, regularisation: float = 0.0, seed: int = 0
) -> FieldProbe:
    """Standardisation and logistic regression (L-BFGS), values and the patients within a value weighing the same.

    C is the value of ``REGULARISATIONS`` with the least log loss out of fold; folds are by patient, so that a probe
    that recognises patients gains nothing.

    Args:
        features: [N, d].
        labels: [N], at least two different values with at least two patients each.
        patients: [N].
        regularisation: C, inverse strength; 0 chooses it.
        seed: Seed of the folds.
    """
    x = np.asarray(features, np.float64)
    weights = patient_weights(labels, patients)
    weights *= len(weights) / weights.sum()
    choices = (regularisation,) if regularisation else REGULARISATIONS
    fewest = min(len(set(patients[labels == value])) for value in set(labels))
    folds = StratifiedGroupKFold(min(FOLDS, fewest), shuffle=True, random_state=seed)
    losses, right = np.zeros(len(choices)), np.zeros((len(choices), len(x)))
    converged = True
    for kept, left in folds.split(x, labels, patients):
        scaler = StandardScaler().fit(x[kept])
        model = _regression(1.0)
        for i, c in enumerate(choices):
            model.set_params(C=c)
            converged &= _fit(model, scaler.transform(x[kept]), labels[kept], weights[kept])
            losses[i] -= weights[left] @ _log_probability(model, scaler, x[left], labels[left])
            right[i, left] = model.predict(scaler.transform(x[left])) == labels[left]
    best = int(np.argmin(losses))
    scaler = StandardScaler().fit(x)
    model = _regression(choices[best])
    converged &= _fit(model, scaler.transform(x), labels, weights)
    if not converged:
        log.warning("A logistic regression did not converge in %d iterations.", MAX_ITER)
    accuracy = float((weights @ right[best]) / weights.sum())
    values = [str(v) for v in model.classes_]
    return FieldProbe(values, scaler, model, choices[best], accuracy, len(x), len(set(patients)), converged)


def _regression(c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=MAX_ITER, tol=1e-4, warm_start=True)


def _fit(model: LogisticRegression, x: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(x, labels, sample_weight=weights)
    return not any(issubclass(w.category, ConvergenceWarning) for w in caught)
