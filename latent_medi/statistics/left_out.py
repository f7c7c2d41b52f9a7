"""Scores of all rows, and without the rows of each patient in turn, from sums by patient: nothing is scored twice.

``patients`` are codes from 0 of which each occurs. Every value without a patient is an array [P] in the order of the
codes; it is NaN where the score does not exist without that patient, such as the only one of a class.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np


@dataclass(frozen=True)
class Score:
    """A score and its values without each patient.

    Args:
        value: The score; NaN where it does not exist.
        left_out: Without each patient in turn, [P].
    """

    value: float
    left_out: np.ndarray


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b > 0))


def mean(values: np.ndarray, patients: np.ndarray) -> Score:
    """Mean of a value per row, [N]: every row weighs the same."""
    sums, counts = np.bincount(patients, values), np.bincount(patients)
    return Score(float(values.mean()), _ratio(values.sum() - sums, len(values) - counts))


def mean_of_groups(values: np.ndarray, groups: np.ndarray, weights: np.ndarray, patients: np.ndarray) -> Score:
    """Weighted sum over groups of the mean of a value per row, such as a balanced accuracy.

    Args:
        values: [N].
        groups: Code of the group of each row, [N].
        weights: Weight of each group, [G], each of which has a row.
        patients: Patient of each row, [N].
    """
    n_groups = len(weights)
    sums, counts = np.bincount(groups, values, n_groups), np.bincount(groups, minlength=n_groups)
    means = sums / counts
    # Only the groups of a patient are other without him.
    pairs, place = np.unique(patients * n_groups + groups, return_inverse=True)
    who, which = np.divmod(pairs, n_groups)
    rest = _ratio(sums[which] - np.bincount(place, values), counts[which] - np.bincount(place))
    moved = np.bincount(who, weights[which] * (rest - means[which]))
    value = float(weights @ means)
    return Score(value, value + moved)


def correlation(truth: np.ndarray, predicted: np.ndarray, n_classes: int, patients: np.ndarray) -> Score:
    """Matthews' correlation of two codes per row (Gorodkin 2004, R_K); 0 where it is undefined, as scikit-learn."""
    eye, n_patients = np.arange(n_classes), int(patients.max()) + 1

    def by_patient(codes: np.ndarray) -> np.ndarray:
        return np.bincount(patients * n_classes + codes, minlength=n_patients * n_classes).reshape(n_patients, len(eye))

    def of(right: np.ndarray, t: np.ndarray, p: np.ndarray) -> np.ndarray:
        total = t.sum(axis=1)
        over = right * total - (t * p).sum(axis=1)
        under = np.sqrt((total**2 - (p**2).sum(axis=1)) * (total**2 - (t**2).sum(axis=1)))
        return np.asarray(np.divide(over, under, out=np.zeros(len(over)), where=under > 0))

    right = np.bincount(patients, truth == predicted)
    t, p = (by_patient(codes).astype(float) for codes in (truth, predicted))
    everything = of(right.sum(keepdims=True), t.sum(axis=0, keepdims=True), p.sum(axis=0, keepdims=True))
    return Score(float(everything[0]), of(right.sum() - right, t.sum(axis=0) - t, p.sum(axis=0) - p))


def calibration_error(probabilities: np.ndarray, truth: np.ndarray, patients: np.ndarray, bins: int) -> Score:
    """Expected calibration error: Σ over bins of |Σ right − Σ confidence| / N (Guo et al. 2017).

    Args:
        probabilities: [N, K]. The confidence is that of the most probable class.
        truth: Class code of each row, [N].
        patients: Patient of each row, [N].
        bins: Number of bins of equal width.
    """
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == truth) - confidence
    place = np.clip((confidence * bins).astype(int), 0, bins - 1)
    counts = np.bincount(patients)
    gaps = np.bincount(patients * bins + place, gap, len(counts) * bins).reshape(-1, bins)
    total = gaps.sum(axis=0)
    rest = np.abs(total - gaps).sum(axis=1)
    return Score(float(np.abs(total).sum() / len(truth)), _ratio(rest, len(truth) - counts))


def area_under_curve(score: np.ndarray, positive: np.ndarray, patients: np.ndarray, n_patients: int) -> Score:
    """Chance that a positive row scores above a negative one, ties half.

    Without a patient, all pairs with a row of his are gone: the placements of his rows (Obuchowski 1997) are left out,
    his own pairs once. One sort serves all patients.

    Args:
        score: [N].
        positive: bool [N].
        patients: Patient of each row, [N]; some of the ``n_patients`` may have none.
        n_patients: P.
    """
    ups, downs = (np.bincount(patients, kind, n_patients) for kind in (positive, ~positive))
    won, lost = _wins(score, positive, np.zeros(len(score), int))
    total = float(won.sum())
    rest = total - np.bincount(patients, np.where(positive, won, lost), n_patients)
    both = (ups > 0) & (downs > 0)
    if both.any():
        own = np.flatnonzero(both[patients])
        rest += np.bincount(patients[own], _wins(score[own], positive[own], patients[own])[0], n_patients)
    n_up, n_down = ups.sum(), downs.sum()
    return Score(
        total / (n_up * n_down) if n_up * n_down else float("nan"), _ratio(rest, (n_up - ups) * (n_down - downs))
    )


def _wins(score: np.ndarray, positive: np.ndarray, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For a positive row the negative ones that it beats, ties half, and 0 for the others, [N]; for a negative row the
    positive ones that beat it, [N]. Only rows of the same code in ``within`` are compared.
    """
    order = np.lexsort((score, within)) if within.any() else np.argsort(score, kind="stable")
    s, w, up = score[order], within[order], positive[order].astype(float)
    first = np.ones(len(s), bool)
    first[1:] = w[1:] != w[:-1]
    tie = np.cumsum(first | np.r_[True, s[1:] != s[:-1]]) - 1
    block = np.cumsum(first) - 1
    in_tie_up, in_tie_down = np.bincount(tie, up), np.bincount(tie, 1 - up)
    before_up, before_down = (np.r_[0.0, np.cumsum(x)[:-1]] for x in (in_tie_up, in_tie_down))
    starts = tie[first]
    of_block_up = np.bincount(block, up)
    below = before_down[tie] - before_down[starts][block] + in_tie_down[tie] / 2
    above = of_block_up[block] - (before_up[tie] - before_up[starts][block]) - in_tie_up[tie] / 2
    won, lost = np.zeros(len(s)), np.zeros(len(s))
    won[order], lost[order] = up * below, (1 - up) * above
    return won, lost


def pairwise_auroc(truth: np.ndarray, probabilities: np.ndarray, patients: np.ndarray) -> Score:
    """One-versus-one AUROC: mean over pairs of classes present of both directions (Hand & Till 2001).

    Args:
        truth: Class code of each row, [N].
        probabilities: [N, K].
        patients: Patient of each row, [N].
    """
    n_patients = int(patients.max()) + 1
    rows = {code: np.flatnonzero(truth == code) for code in np.unique(truth).tolist()}
    value, left_out, n = 0.0, np.zeros(n_patients), 0
    for a, b in combinations(rows, 2):
        pair = np.concatenate([rows[a], rows[b]])
        for code in (b,) if probabilities.shape[1] == 2 else (a, b):
            found = area_under_curve(probabilities[pair, code], truth[pair] == code, patients[pair], n_patients)
            value, left_out, n = value + found.value, left_out + found.left_out, n + 1
    if n == 0:
        return Score(float("nan"), np.full(n_patients, np.nan))
    return Score(value / n, left_out / n)
