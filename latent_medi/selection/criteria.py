"""What tells a good synthetic patch from a bad one: distances to real patches, probes that learned from them, copies.

Arrays in, arrays out. Features are L2-normalised rows; a distance between two is the cosine distance
1 − cos(a, b) = ½·|a − b|², from 0 (the same direction) to 2.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.preprocessing import StandardScaler

from latent_medi.core.progress import get_logger, progress
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.shards.dataset import PatchDataset

log = get_logger(__name__)

REGULARISATIONS = (0.001, 0.01, 0.1, 1.0)
"""Values of C that cross-validation chooses from."""
FOLDS = 3
MAX_ITER = 5000
_QUERIES, _BANK = 1024, 16384  # rows per block: 64 MiB of distances in float32
_ROUNDING = 1e-5  # of a float32 cosine distance, generously


def normalise(features: np.ndarray) -> np.ndarray:
    """Give every row of float32 [N, d] the length 1, in place; a row of zeros stays. Returns the array."""
    for start in range(0, len(features), _BANK):
        part = features[start : start + _BANK]
        part /= np.maximum(np.linalg.norm(part, axis=1, keepdims=True), 1e-12)
    return features


def patient_weights(labels: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Weight of each row such that a label's rows sum to 1 and its patients weigh the same. float64 [N]."""
    pairs, pair = np.unique(np.stack([labels.astype(str), patients.astype(str)], 1), axis=0, return_inverse=True)
    per_pair = np.bincount(pair.reshape(-1))
    names, of_pair = np.unique(pairs[:, 0], return_inverse=True)
    per_label = np.bincount(of_pair, minlength=len(names))
    return 1.0 / (per_pair * per_label[of_pair])[pair.reshape(-1)]


def evenly(patients: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most ``most`` positions, ascending, taken from the patients in turn. int64."""
    if len(patients) <= most:
        return np.arange(len(patients))
    order = np.random.default_rng([seed, 11]).permutation(len(patients))
    _, codes = np.unique(patients.astype(str), return_inverse=True)
    turn = np.empty(len(patients), np.int64)  # how many of the same patient came before
    by_patient = order[np.argsort(codes[order], kind="stable")]
    starts = np.r_[0, np.cumsum(np.bincount(codes))[:-1]]
    turn[by_patient] = np.arange(len(patients)) - starts[codes[by_patient]]
    return np.sort(order[np.argsort(turn[order], kind="stable")][:most])


@dataclass
class Effects:
    """What each value of each field adds to a feature, as far as effects add up.

    Args:
        values: Values by field, in order.
        vectors: Their effects by field, float32 [values + 1, d]; the last is that of an unknown value, 0.
    """

    values: dict[str, list[str]]
    vectors: dict[str, np.ndarray]

    def take_out(self, features: np.ndarray, index: pd.DataFrame, fields: Sequence[str]) -> np.ndarray:
        """The features less the effects of the stated values of some fields, float32 [N, d].

        Args:
            features: [N, d].
            index: Their rows, with the columns of ``fields``.
            fields: What to take out.
        """
        result = np.array(features, np.float32)
        for name in fields:
            codes = pd.Categorical(index[name], self.values[name]).codes  # -1, the last vector, for anything else
            for start in range(0, len(result), _BANK):
                result[start : start + _BANK] -= self.vectors[name][codes[start : start + _BANK]]
        return result


def additive_effects(features: np.ndarray, index: pd.DataFrame, fields: Sequence[str]) -> Effects:
    """Least squares of real features on the values of all fields at once, every patient weighing the same.

    A combination without training patches is then the sum of its parts: what a site does to a patch is learned from
    the classes that it has. The effects of a field's values sum to 0. Fields that the data cannot tell apart share
    their effect (the solution of least norm).

    Args:
        features: [N, d].
        index: ``patient`` and the columns of ``fields``, [N].
        fields: Categorical fields.
    """
    patients = index["patient"].to_numpy(str)
    weights = patient_weights(np.full(len(patients), ""), patients)
    values = {name: sorted(set(index[name]) - {UNKNOWN_WORD}) for name in fields}
    coded = {name: pd.Categorical(index[name], values[name]).codes for name in fields}
    size = 1 + sum(map(len, values.values()))
    normal, moments = np.zeros((size, size)), np.zeros((size, features.shape[1]))
    for start in range(0, len(features), _BANK):
        part = slice(start, start + _BANK)
        blocks = [np.ones((len(weights[part]), 1))]
        blocks += [(coded[name][part, None] == np.arange(len(values[name]))).astype(np.float64) for name in fields]
        design = np.concatenate(blocks, axis=1)
        weighted = design * weights[part, None]
        normal += weighted.T @ design
        moments += weighted.T @ features[part].astype(np.float64)
    solution = np.linalg.lstsq(normal, moments, rcond=1e-10)[0][1:]
    vectors: dict[str, np.ndarray] = {}
    for name in fields:
        own, solution = np.split(solution, [len(values[name])])
        own = own - own.mean(axis=0) if len(own) else own
        vectors[name] = np.concatenate([own, np.zeros((1, features.shape[1]))]).astype(np.float32)
    return Effects(values, vectors)


def class_centroids(features: np.ndarray, labels: np.ndarray, patients: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Mean normalised feature of each label, every patient weighing the same.

    Returns:
        The labels in order and float64 [G, d].
    """
    weights = patient_weights(labels, patients)
    names = sorted(set(labels.tolist()))
    centroids = [weights[labels == name] @ features[labels == name].astype(np.float64) for name in names]
    return names, np.stack(centroids)


def squared_distances(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared Euclidean distance to each centroid, float64 [N, G]: HistoDiffusion's filter, up to its factor 1/d."""
    result = np.empty((len(features), len(centroids)))
    for start in range(0, len(features), _BANK):
        x = features[start : start + _BANK].astype(np.float64)
        cross = x @ centroids.T
        result[start : start + _BANK] = (x * x).sum(1)[:, None] + (centroids * centroids).sum(1)[None] - 2 * cross
    return np.maximum(result, 0.0)


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
        for start in range(0, len(features), _BANK):
            part = slice(start, start + _BANK)
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


def nearest_distances(
    queries: np.ndarray,
    bank: np.ndarray,
    apart: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    device: str = "cpu",
    desc: str = "nearest patches",
) -> np.ndarray:
    """Cosine distance from each query to the nearest row of the bank, in blocks: no N × M matrix is ever held.

    Args:
        queries: Normalised features [N, d].
        bank: Normalised features [M, d].
        apart: Integer codes of the queries and of the bank: pairs with the same code in any are left out.
        device: Torch device of the products.
        desc: What the progress line calls it.

    Returns:
        float64 [N]; infinity where every pair is left out.
    """
    where = torch.device(device)
    best = np.full(len(queries), -np.inf, np.float32)
    found = np.zeros(len(queries), np.int64)
    codes = [(torch.as_tensor(q).to(where), torch.as_tensor(b).to(where)) for q, b in apart]
    for start in progress(range(0, len(bank), _BANK), desc=desc, unit="block"):
        block = torch.from_numpy(bank[start : start + _BANK]).to(where)
        for first in range(0, len(queries), _QUERIES):
            part = slice(first, first + _QUERIES)
            cosine = torch.from_numpy(queries[part]).to(where) @ block.T
            for of_query, of_bank in codes:
                same = of_query[part][:, None] == of_bank[start : start + _BANK][None]
                cosine.masked_fill_(same, -torch.inf)
            value, position = (t.cpu().numpy() for t in cosine.max(dim=1))
            better = value > best[part]
            best[part] = np.where(better, value, best[part])
            found[part] = np.where(better, position + start, found[part])
    # The products rank; what is compared with a threshold is exact, down to a distance of 0 for a copy.
    result = _exact(queries, bank, np.arange(len(queries)), found)
    result[np.isneginf(best)] = np.inf
    return result


def _exact(a: np.ndarray, b: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    result = np.empty(len(rows))
    for start in range(0, len(rows), _BANK):
        part = slice(start, start + _BANK)
        difference = a[rows[part]].astype(np.float64) - b[columns[part]]
        result[part] = (difference * difference).sum(axis=1) / 2
    return result


def without_near_duplicates(features: np.ndarray, threshold: float, device: str = "cpu") -> np.ndarray:
    """Which rows stay if every row that is closer than ``threshold`` to an earlier one that stays is dropped.

    Args:
        features: Normalised features [N, d], the best first.
        threshold: Cosine distance.
        device: Torch device of the products.

    Returns:
        bool [N].
    """
    where = torch.device(device)
    keep = np.ones(len(features), bool)
    for start in progress(range(0, len(features), _QUERIES), desc="near duplicates", unit="block"):
        stop = min(start + _QUERIES, len(features))
        mine = torch.from_numpy(features[start:stop]).to(where)
        alive = np.ones(stop - start, bool)
        for first in range(0, start, _BANK):
            bank = np.flatnonzero(keep[first : min(first + _BANK, start)]) + first
            rows, columns = _close(mine, features[bank], threshold, where)
            near = _exact(features, features, rows + start, bank[columns]) < threshold
            alive[rows[near]] = False
        rows, columns = _close(mine, features[start:stop], threshold, where)
        later = rows > columns
        rows, columns = rows[later], columns[later]
        near = _exact(features, features, rows + start, columns + start) < threshold
        order = np.argsort(rows[near], kind="stable")
        for row, column in zip(rows[near][order].tolist(), columns[near][order].tolist(), strict=True):
            # In order of rows: whether the earlier one of the pair stays is settled.
            if alive[column]:
                alive[row] = False
        keep[start:stop] = alive
    return keep


def _close(
    mine: torch.Tensor, bank: np.ndarray, threshold: float, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that may be closer than the threshold, as far as float32 can tell."""
    pairs = torch.nonzero(mine @ torch.from_numpy(bank).to(device).T > 1.0 - threshold - _ROUNDING)
    rows, columns = pairs.T.cpu().numpy()
    return rows, columns


def pixel_identities(dataset: PatchDataset, rows: np.ndarray, batch: int, workers: int = 0) -> list[bytes]:
    """What patches with the same pixels have in common, turned or mirrored too: the least SHA-256 of the 8 views."""
    result = []
    batches = dataset.iterate(rows, batch, workers)
    for _, images in progress(batches, -(-len(rows) // batch), f"pixels of {dataset.name}", "batch"):
        for image in images:
            turned = [np.rot90(image, k) for k in range(4)]
            views = [*turned, *(view[:, ::-1] for view in turned)]
            result.append(min(hashlib.sha256(np.ascontiguousarray(view).tobytes()).digest() for view in views))
    return result


def best_per_cell(scores: np.ndarray, keys: np.ndarray, cells: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The best-ranked rows of each cell.

    Args:
        scores: The lower the better, [N]; infinity for what is never chosen. Equal ones are ranked by key.
        keys: A different string per row, [N].
        cells: Cell of each row, int from 0, [N].
        most: Rows to choose at most, by cell.

    Returns:
        bool [N].
    """
    order = np.lexsort((keys, scores, cells))
    ordered = cells[order]
    starts = np.searchsorted(ordered, np.arange(len(most)))
    place = np.arange(len(order)) - starts[ordered]
    chosen = np.zeros(len(order), bool)
    chosen[order] = (place < most[ordered]) & np.isfinite(scores[order])
    return chosen
