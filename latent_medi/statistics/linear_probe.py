"""The linear probe: standardisation and logistic regression on frozen features, fitted, fine-tuned, cross-validated."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import softmax
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.utils.class_weight import compute_sample_weight

from latent_medi.core.progress import get_logger
from latent_medi.statistics.additive_effects import patient_weights
from latent_medi.statistics.distances import blocks
from latent_medi.statistics.logistic_regression import Problem, Scaling, Solution
from latent_medi.statistics.patient_means import PatientTable
from latent_medi.statistics.subsampling import whole_patients

log = get_logger(__name__)
MAX_ITER = 5000
C_GRID = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
"""Values of C that :func:`choose_regularisation` compares."""
C_GRID_WEIGHTED = (0.001, 0.01, 0.1, 1.0)
"""Values of C that :func:`fit_validated_linear_probe` compares."""
_FOLDS, _FOLDS_WEIGHTED = 5, 3
_MAX_TRAINING = 20_000  # rows that take part in the choice of C
_MIN_SITES = 3  # with fewer, leaving a site out leaves one that cannot stand for "several hospitals"
_NEVER_SEEN = -50.0  # log probability of a value that the training rows lack


@dataclass
class LinearProbe:
    """A fitted linear probe.

    Args:
        classes: Labels that the probe distinguishes, in order, [K].
        scaling: Standardisation of the training features.
        weights: Of the standardised features, [K, d]; [1, d] for two classes.
        intercept: [K] or [1].
        converged: Whether the optimiser reached its tolerance.
    """

    classes: np.ndarray
    scaling: Scaling
    weights: np.ndarray
    intercept: np.ndarray
    converged: bool

    @classmethod
    def of(cls, classes: np.ndarray, scaling: Scaling, solution: Solution) -> LinearProbe:
        """The probe with a solution's weights; a warning is logged if it did not converge."""
        if not solution.converged:
            log.warning("A logistic regression did not converge in %d iterations.", MAX_ITER)
        return cls(classes, scaling, solution.weights, solution.intercept, solution.converged)

    @property
    def values(self) -> list[str]:
        """Labels that the probe distinguishes, in order."""
        return [str(value) for value in self.classes]

    @property
    def rows(self) -> np.ndarray:
        """Weights with the intercept last, [K, d + 1] also for two classes."""
        rows = np.column_stack([self.weights, self.intercept])
        return np.concatenate([-rows / 2, rows / 2]) if len(rows) == 1 else rows

    def start_for(self, classes: np.ndarray, scaling: Scaling) -> np.ndarray | None:
        """The weights as those of otherwise scaled features, the intercept last; None for other classes."""
        if not np.array_equal(classes, self.classes):
            return None
        raw = self.weights / self.scaling.scale
        moved = self.intercept + raw @ (scaling.centre - self.scaling.centre)
        return np.column_stack([raw * scaling.scale, moved])

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Logit of each class, float64 [N, K]; of two classes the first has 0."""
        weights = self.weights / self.scaling.scale
        offset = self.intercept - weights @ self.scaling.centre
        found = np.empty((len(features), len(weights)))
        for part in blocks(len(features)):
            found[part] = np.asarray(features[part], np.float64) @ weights.T + offset
        return np.column_stack([np.zeros(len(found)), found]) if len(weights) == 1 else found

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Predicted label of each row of [N, d]."""
        return np.asarray(self.classes[self.logits(features).argmax(axis=1)])

    def probabilities(self, features: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """Probability of each class, [N, len(classes)]; 0 for a class that the training rows lack."""
        found = softmax(self.logits(features), axis=1)
        known = {value: i for i, value in enumerate(self.values)}
        return np.stack([found[:, known[c]] if c in known else np.zeros(len(found)) for c in classes], axis=1)

    def log_probability(self, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Log probability of one label per row, float64 [N], exact also where the probability is next to 1.

        Args:
            features: [N, d].
            labels: The label whose probability is returned, [N]. One that the training rows lack gets −50.
        """
        codes = {value: i for i, value in enumerate(self.classes)}
        own = np.array([codes.get(label, -1) for label in labels], np.int64)
        scores, rows = self.logits(features), np.arange(len(features))
        others = scores.copy()
        others[rows, own] = -np.inf
        largest = others.max(axis=1, keepdims=True)
        rest = largest[:, 0] + np.log(np.exp(others - largest).sum(axis=1))
        return np.where(own >= 0, -np.logaddexp(0.0, rest - scores[rows, own]), _NEVER_SEEN)


@dataclass
class ValidatedLinearProbe(LinearProbe):
    """A linear probe with its accuracy on patients that it did not learn from.

    Args:
        regularisation: C.
        accuracy: Out of fold, 0 to 1: mean over values of the mean over the value's patients.
        n_patches, n_patients: Training rows and their patients.
    """

    regularisation: float
    accuracy: float
    n_patches: int
    n_patients: int


def fit_linear_probe(
    features: np.ndarray,
    labels: np.ndarray,
    regularisation: float = 1.0,
    sample_weight: np.ndarray | None = None,
    scaling: Scaling | None = None,
    start: LinearProbe | None = None,
    device: str = "cpu",
) -> LinearProbe:
    """Standardisation and logistic regression with balanced classes: Σ loss·C + ½‖W‖².

    Classes are weighted equally, so that adding patches of a class is never rewarded for moving its prior.

    Args:
        features: [N, d].
        labels: [N], at least two different.
        regularisation: C.
        sample_weight: Weight per row; then classes are balanced only by these weights.
        scaling: Standardisation of other patches, instead of one fitted to these.
        start: A probe fitted to similar patches, which saves time: the optimiser starts from its weights.
        device: Torch device.
    """
    scaling = scaling or Scaling.standard(features)
    classes, problem = _problem(features, labels, sample_weight, scaling, device)
    begin = start.start_for(classes, scaling) if start else None
    return LinearProbe.of(classes, scaling, problem.solve(regularisation, MAX_ITER, begin))


def _problem(
    features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None, scaling: Scaling, device: str = "cpu"
) -> tuple[np.ndarray, Problem]:
    """Classes and the logistic regression of some rows; without weights, classes weigh the same."""
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"all labels are {classes[0]!r}: a linear probe needs two")
    balanced = compute_sample_weight("balanced", codes) if weights is None else weights
    return classes, Problem(features, codes, balanced, scaling, device)


def fine_tune_linear_probe(
    first: tuple[np.ndarray, np.ndarray],
    features: np.ndarray,
    labels: np.ndarray,
    regularisation: float = 1.0,
    device: str = "cpu",
) -> LinearProbe:
    """A linear probe pre-trained on some patches and fine-tuned on others.

    The pre-trained weights W₀ are those of :func:`fit_linear_probe` on the first patches; fine-tuning starts there and
    minimises Σ loss·C + ½‖W − W₀‖² over the second, so it leaves W₀ only where they say so. A class that the first
    patches lack starts from zero. Both use the standardisation of the second patches. Without first patches, this is
    :func:`fit_linear_probe`.

    Args:
        first: Features [M, d] and labels [M] to learn from first; fewer than two classes count as none.
        features: [N, d] to fine-tune on.
        labels: [N], at least two different.
        regularisation: C, the same for both.
        device: Torch device.
    """
    if len(np.unique(first[1])) < 2:
        return fit_linear_probe(features, labels, regularisation, device=device)
    scaling = Scaling.standard(features)
    before = fit_linear_probe(first[0], first[1], regularisation, scaling=scaling, device=device)
    classes, problem = _problem(features, labels, None, scaling, device)
    start = np.zeros((len(classes), features.shape[1] + 1))
    for value, row in zip(before.classes, before.rows, strict=True):
        start[classes == value] = row
    if len(classes) == 2:  # one row, the difference: its penalty is what scikit-learn's is
        start = start[1:] - start[:1]
    probe = LinearProbe.of(classes, scaling, problem.solve(regularisation, MAX_ITER, towards=start))
    probe.converged &= before.converged
    return probe


@dataclass(frozen=True)
class RegularisationChoice:
    """How C was chosen.

    Args:
        value: C.
        chosen: False if no fold could be made; C is 1 then.
        over: What the folds hold out.
        folds: Number of folds.
        grid: Values of C that were compared.
        scores: Balanced accuracy of each, averaged over the folds; NaN without folds.
        n_patches, n_patients: Rows that took part and their patients.
    """

    value: float
    chosen: bool
    over: Literal["sites", "patients"]
    folds: int
    grid: list[float]
    scores: list[float]
    n_patches: int
    n_patients: int


def choose_regularisation(
    features: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray,
    sites: np.ndarray,
    seed: int,
    grid: Sequence[float] = C_GRID,
) -> RegularisationChoice:
    """Choose C by cross-validation over sites where there are three or more, otherwise over patients.

    Only training patches may be given. With three or more sites each of up to five folds scores sites that it did not
    learn from, and leaves out of its training the other patches of the patients that it scores; with fewer, each fold
    scores patients. The score is the balanced accuracy over classes of patient means; of equal ones the stronger
    regularisation wins.

    Args:
        features: [N, d].
        labels: [N].
        patients: Patient of each row, [N].
        sites: Site of each row, [N].
        seed: Seed of the folds, and of the subsample of patients beyond 20,000 rows.
        grid: Candidates, ascending.
    """
    rows = whole_patients(patients, _MAX_TRAINING, np.random.default_rng([seed, 23]))
    x, y, who, where = (np.asarray(v)[rows] for v in (features, labels, patients, sites))
    over, folds = _folds(y, who, where, seed)
    classes, codes = np.unique(y, return_inverse=True)
    names, people = np.unique(who, return_inverse=True)
    scores = np.full((len(folds), len(grid)), np.nan)
    for i, j, held_out, probe in _out_of_fold(x, y, folds, grid):
        table = PatientTable(codes, people, np.isin(np.arange(len(y)), held_out), len(classes), len(names))
        right = np.zeros(len(y))
        right[held_out] = probe.predict(x[held_out]) == y[held_out]
        scores[i, j] = table.mean(right)
    mean = scores.mean(axis=0) if len(folds) else np.full(len(grid), np.nan)
    value = float(grid[int(np.argmax(mean))]) if len(folds) else 1.0
    return RegularisationChoice(
        value, bool(len(folds)), over, len(folds), list(grid), mean.tolist(), len(rows), len(names)
    )


def fit_validated_linear_probe(
    features: np.ndarray, labels: np.ndarray, patients: np.ndarray, regularisation: float = 0.0, seed: int = 0
) -> ValidatedLinearProbe:
    """Fit a linear probe in which values weigh the same, and the patients within a value; validate it on patients.

    C is the value of :data:`C_GRID_WEIGHTED` with the least log loss out of fold. Folds are by patient, so that a
    probe gains nothing by recognising patients.

    Args:
        features: [N, d].
        labels: [N], at least two different values with at least two patients each.
        patients: [N].
        regularisation: C, inverse strength; 0 chooses it.
        seed: Seed of the folds.
    """
    x = features
    weights = patient_weights(labels, patients)
    weights *= len(weights) / weights.sum()
    grid = (regularisation,) if regularisation else C_GRID_WEIGHTED
    fewest = min(len(set(patients[labels == value])) for value in set(labels))
    splitter = StratifiedGroupKFold(min(_FOLDS_WEIGHTED, fewest), shuffle=True, random_state=seed)
    losses, right = np.zeros(len(grid)), np.zeros((len(grid), len(x)))
    converged = True
    for _, j, held_out, probe in _out_of_fold(x, labels, splitter.split(x, labels, patients), grid, weights):
        losses[j] -= weights[held_out] @ probe.log_probability(x[held_out], labels[held_out])
        right[j, held_out] = probe.predict(x[held_out]) == labels[held_out]
        converged &= probe.converged
    best = int(np.argmin(losses))
    probe = fit_linear_probe(x, labels, grid[best], weights)
    accuracy = float((weights @ right[best]) / weights.sum())
    converged &= probe.converged
    probe.converged = converged
    return ValidatedLinearProbe(
        **vars(probe), regularisation=grid[best], accuracy=accuracy, n_patches=len(x), n_patients=len(set(patients))
    )


def _out_of_fold(
    x: np.ndarray,
    labels: np.ndarray,
    folds: Iterable[tuple[np.ndarray, np.ndarray]],
    grid: Sequence[float],
    weights: np.ndarray | None = None,
) -> Iterator[tuple[int, int, np.ndarray, LinearProbe]]:
    """Number of the fold and of the candidate, rows that are held out, and the linear probe fitted to the others.

    The fit of a candidate starts from that of the one before.
    """
    for i, (training, held_out) in enumerate(folds):
        scaling = Scaling.standard(x[training])
        weight = None if weights is None else weights[training]
        classes, problem = _problem(x[training], labels[training], weight, scaling)
        start = None
        for j, c in enumerate(grid):
            solution = problem.solve(c, MAX_ITER, start)
            start = np.column_stack([solution.weights, solution.intercept])
            yield i, j, held_out, LinearProbe.of(classes, scaling, solution)


def _folds(
    labels: np.ndarray, patients: np.ndarray, sites: np.ndarray, seed: int
) -> tuple[Literal["sites", "patients"], list[tuple[np.ndarray, np.ndarray]]]:
    """What the folds hold out, and for each fold the rows to learn from and those to score, which share no patient.

    A fold with a single class to learn is left out.
    """
    rows = np.arange(len(labels))
    n_sites, n_patients = len(np.unique(sites)), len(np.unique(patients))

    def usable(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        disjoint = [(learn[~np.isin(patients[learn], patients[held])], held) for learn, held in pairs]
        return [(a, b) for a, b in disjoint if len(b) and len(np.unique(labels[a])) >= 2]

    if n_sites >= _MIN_SITES:
        wanted = min(_FOLDS, n_sites)
        folds = usable(GroupKFold(wanted).split(rows, labels, sites))
        # Once patients with patches at several sites are taken out, little may be left to learn from.
        if len(folds) == wanted and min(len(learn) for learn, _ in folds) >= len(rows) / 3:
            return "sites", folds
    folds = []
    if n_patients >= 2:
        splitter = StratifiedGroupKFold(min(_FOLDS, n_patients), shuffle=True, random_state=seed)
        with warnings.catch_warnings():  # a class with fewer patches than folds is in some folds only, which is fine
            warnings.simplefilter("ignore", UserWarning)
            folds = usable(splitter.split(rows, labels, patients))
    return "patients", folds
