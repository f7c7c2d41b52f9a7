"""Scores of class probabilities at patch, slide and patient level, each with its patient bootstrap.

Points are scikit-learn's where it has the score. Intervals weigh patients instead of repeating rows, all resamples at
once, which is why each score has a weighted form here; with every weight 1 it equals the point.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef, roc_auc_score

from latent_medi.evaluation.cohort.study import Study
from latent_medi.statistics.bootstrap import MIN_PATIENTS, NOT_ESTIMABLE, PatientResamples, measure

LEVELS = ("patch", "slide", "patient")
BINS = 15
"""Bins of equal width for the calibration error."""


@dataclass
class Units:
    """What is judged: patches, slides or patients.

    Args:
        group: Unit of each test patch, [n_test].
        truth: Class code of each unit, [U].
        sites: Site of each unit, [U].
        patients: Patient code of each unit, into the resamples' names, [U].
    """

    group: np.ndarray
    truth: np.ndarray
    sites: np.ndarray
    patients: np.ndarray

    @classmethod
    def of(cls, level: str, study: Study, codes: np.ndarray, patients: np.ndarray) -> Units:
        """Units of the test patches.

        A slide's (or patient's) unit is its patches of one class and site: where it shows several classes it counts
        once for each, since no single answer would be right.

        Args:
            level: One of ``LEVELS``.
            study: The cohort.
            codes: Class code of each test patch.
            patients: Patient code of each test patch.
        """
        sites = study.site_labels[study.test]
        if level == "patch":
            return cls(np.arange(len(codes)), codes, sites, patients)
        names = study.index[level].to_numpy(str)[study.test]
        # A slide's name may recur with another patient.
        table = pd.DataFrame({"patient": patients, "name": names, "class": codes, "site": sites})
        group = table.groupby(list(table.columns), sort=True).ngroup().to_numpy()
        first = np.unique(group, return_index=True)[1]
        return cls(group, codes[first], sites[first], patients[first])

    def mean(self, probabilities: np.ndarray) -> np.ndarray:
        """Mean probability over the patches of each unit: [n_test, K] to [U, K]."""
        sums = np.zeros((len(self.truth), probabilities.shape[1]))
        np.add.at(sums, self.group, probabilities)
        return sums / np.bincount(self.group, minlength=len(self.truth))[:, None]


class Levels:
    """Scores at every level, over all test patches and over those under shift.

    Args:
        study: The cohort.
        codes: Class code of each test patch, [n_test].
        shift: Which test patches come from a site with a held-out combination, bool [n_test].
        bootstrap: Resamples of the test patients.
    """

    def __init__(self, study: Study, codes: np.ndarray, shift: np.ndarray, bootstrap: PatientResamples) -> None:
        self.classes = study.classes
        self.bootstrap = bootstrap
        self.units = {level: Units.of(level, study, codes, bootstrap.codes) for level in LEVELS}
        self.shift = shift

    def score(self, probabilities: np.ndarray) -> dict[str, Any]:
        """By level, then "shift" or "all", the record of :func:`unit_scores`.

        Args:
            probabilities: [n_test, K], rows sum to 1.
        """
        result: dict[str, Any] = {}
        for level, units in self.units.items():
            mean = units.mean(probabilities)
            counts = np.bincount(units.group, minlength=len(units.truth))
            shifted = np.zeros(len(units.truth), bool)
            shifted[units.group[self.shift]] = True  # a unit lies at one site, so all of it is shifted or none
            result[level] = {
                name: unit_scores(
                    mean[keep], units.truth[keep], units.sites[keep], units.patients[keep], counts[keep],
                    self.classes, self.bootstrap.weights,
                )
                for name, keep in (("shift", shifted), ("all", np.ones(len(units.truth), bool)))
            }  # fmt: skip
        return result


def unit_scores(
    probabilities: np.ndarray,
    truth: np.ndarray,
    sites: np.ndarray,
    patients: np.ndarray,
    counts: np.ndarray,
    classes: Sequence[str],
    weights: np.ndarray,
) -> dict[str, Any]:
    """Every score of some units.

    Args:
        probabilities: [U, K].
        truth: Class code, [U].
        sites: Site, [U].
        patients: Patient code, [U].
        counts: Patches of each unit, [U].
        classes: Class values, K.
        weights: Patient weights, [B, P].

    Returns:
        Measures: ``balanced_accuracy``; ``site_averaged_accuracy`` (the mean over sites of the balanced accuracy over
        the classes there); ``mcc``; ``auroc`` (one class versus one other, mean over pairs, Hand & Till 2001);
        ``ece`` (of the most probable class, 15 bins of equal width); ``brier`` (squared error summed over classes, 0 to
        2); ``worst_group`` (the lowest accuracy, averaged over patients, of class × site groups with at least 10
        patients, with its ``group`` and the groups ``not_estimable``).
    """
    support: dict[str, Any] = {
        "n_patches": int(counts.sum()),
        "n_patients": len(np.unique(patients)),
        "n_units": len(truth),
    }
    names = ("balanced_accuracy", "site_averaged_accuracy", "mcc", "auroc", "ece", "brier", "worst_group")
    if len(truth) == 0:
        return {name: measure(None, 0, 0, n_units=0) for name in names}
    predicted = probabilities.argmax(axis=1)
    unit_weights = weights[:, patients]
    once = np.ones((1, len(truth)))
    squares = ((probabilities - np.eye(len(classes))[truth]) ** 2).sum(axis=1)
    points = {
        "balanced_accuracy": quiet_balanced(truth, predicted),
        "site_averaged_accuracy": site_averaged(truth, predicted, sites),
        "mcc": float(matthews_corrcoef(truth, predicted)),
        "auroc": _auroc(truth, probabilities),
        "ece": float(calibration_errors(probabilities, truth, once)[0]),
        "brier": float(squares.mean()),
    }
    draws = {
        "balanced_accuracy": _recalls(truth, predicted, unit_weights).mean(axis=1),
        "site_averaged_accuracy": _site_averages(truth, predicted, sites, unit_weights),
        "mcc": correlations(truth, predicted, len(classes), unit_weights),
        "auroc": aurocs(truth, probabilities, unit_weights),
        "ece": calibration_errors(probabilities, truth, unit_weights),
        "brier": _ratio(unit_weights @ squares, unit_weights.sum(axis=1)),
    }
    places = np.unique(np.column_stack([truth, np.unique(sites, return_inverse=True)[1], patients]), axis=0)
    by_class, by_site = _fewest(places[:, [0, 2]]), _fewest(places)
    smallest = {"balanced_accuracy": by_class, "auroc": by_class, "site_averaged_accuracy": by_site}
    record = {}
    for name, value in points.items():
        record[name] = measure(
            value, draws=draws[name], smallest_group=smallest.get(name), lowest=-1.0 if name == "mcc" else 0.0,
            # |gap| is raised by resampling, since the gaps of a resample do not cancel.
            recentre=name == "ece", highest=2.0 if name == "brier" else 1.0,
            rate=name in ("balanced_accuracy", "site_averaged_accuracy"), **support,
        )  # fmt: skip
        bounds = record[name]["interval"]
        if isinstance(bounds, list) and bounds[0] == bounds[1]:
            record[name] |= {"interval": NOT_ESTIMABLE, "reason": "all patients agree"}
    record["worst_group"] = worst_group(truth, predicted, sites, patients, counts, classes, weights)
    return record


def _fewest(rows: np.ndarray) -> int:
    """Of rows [n, k] that end in a patient: the fewest different patients of any group that the other columns name."""
    groups = np.unique(rows, axis=0)[:, :-1]
    return int(np.unique(groups, axis=0, return_counts=True)[1].min())


def worst_group(
    truth: np.ndarray,
    predicted: np.ndarray,
    sites: np.ndarray,
    patients: np.ndarray,
    counts: np.ndarray,
    classes: Sequence[str],
    weights: np.ndarray,
) -> dict[str, Any]:
    """The class × site group with the lowest accuracy; arguments as in :func:`unit_scores`, ``predicted`` codes [U].

    A group's accuracy is averaged over patients first; a resample's value is the lowest among the same groups. Groups
    of fewer than 10 patients are named, not judged. The lowest of several estimates lies below the lowest truth, and
    the lowest of several resampled ones below that: the interval is moved back to the value, which keeps its own bias.
    """
    right = (predicted == truth).astype(float)
    groups: list[tuple[str, float, np.ndarray]] = []
    small: list[dict[str, Any]] = []
    n_patches, people, sizes = 0, set[int](), list[int]()
    for code, name in enumerate(classes):
        for site in np.unique(sites):
            rows = np.flatnonzero((truth == code) & (sites == site))
            here, inverse = np.unique(patients[rows], return_inverse=True)
            label = f"{name} × {site}"
            if 0 < len(here) < MIN_PATIENTS:
                small.append({"group": label, "n_patients": len(here)})
            elif len(here):
                means = np.bincount(inverse, right[rows]) / np.bincount(inverse)
                w = weights[:, here]
                groups.append((label, float(means.mean()), _ratio(w @ means, w.sum(axis=1))))
                n_patches += int(counts[rows].sum())
                people |= set(here.tolist())
                sizes.append(len(here))
    if not groups:
        return measure(None, 0, 0, group=None, n_groups=0, not_estimable=small)
    label, value, _ = min(groups, key=lambda g: g[1])
    draws = np.stack([g[2] for g in groups])
    draws = np.where(np.isnan(draws).any(axis=0), np.nan, draws.min(axis=0))
    return measure(value, n_patches, len(people), draws, recentre=True, lowest=0.0, highest=1.0,
                   rate=True, smallest_group=min(sizes),
                   group=label, n_groups=len(groups), not_estimable=small)  # fmt: skip


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b > 0)


def quiet_balanced(truth: np.ndarray, predicted: np.ndarray) -> float:
    """scikit-learn's balanced accuracy over the classes present in the truth, without its warning of others."""
    with warnings.catch_warnings():  # a class that is predicted but not present is no error
        warnings.simplefilter("ignore", UserWarning)
        return float(balanced_accuracy_score(truth, predicted))


def site_averaged(truth: np.ndarray, predicted: np.ndarray, sites: np.ndarray) -> float:
    """Mean over sites of the balanced accuracy over the classes that a site has."""
    return float(np.mean([quiet_balanced(truth[sites == s], predicted[sites == s]) for s in np.unique(sites)]))


def _recalls(truth: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Recall of each class present, [B, classes]; NaN where a resample has lost it."""
    parts = []
    for code in np.unique(truth):
        w = weights[:, truth == code]
        parts.append(_ratio(w @ (predicted[truth == code] == code).astype(float), w.sum(axis=1)))
    return np.stack(parts, axis=1)


def _site_averages(truth: np.ndarray, predicted: np.ndarray, sites: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """A resample averages over the classes that it still has at a site and over the sites that it still has."""
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean over nothing is NaN, and left out
        for site in np.unique(sites):
            here = sites == site
            parts.append(np.nanmean(_recalls(truth[here], predicted[here], weights[:, here]), axis=1))
        return np.nanmean(np.stack(parts, axis=1), axis=1)


def correlations(truth: np.ndarray, predicted: np.ndarray, n_classes: int, weights: np.ndarray) -> np.ndarray:
    """Matthews' correlation of each resample, [B] (Gorodkin 2004, R_K); 0 where it is undefined, as scikit-learn."""
    cell = truth * n_classes + predicted
    order = np.argsort(cell, kind="stable")
    present, starts = np.unique(cell[order], return_index=True)
    flat = np.zeros((len(weights), n_classes * n_classes))
    flat[:, present] = np.add.reduceat(weights[:, order], starts, axis=1)
    confusion = flat.reshape(-1, n_classes, n_classes)
    total = confusion.sum(axis=(1, 2))
    right = np.trace(confusion, axis1=1, axis2=2)
    t, p = confusion.sum(axis=2), confusion.sum(axis=1)
    over = right * total - (t * p).sum(axis=1)
    under = np.sqrt((total**2 - (p**2).sum(axis=1)) * (total**2 - (t**2).sum(axis=1)))
    return np.divide(over, under, out=np.zeros(len(over)), where=under > 0)


def calibration_errors(probabilities: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expected calibration error of each resample, [B]: Σ over bins of |Σ right − Σ confidence| / n (Guo et al. 2017).

    The confidence is the probability of the most probable class.
    """
    confidence = probabilities.max(axis=1)
    right = (probabilities.argmax(axis=1) == truth).astype(float)
    bins = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    gaps = np.eye(BINS)[bins] * (right - confidence)[:, None]
    return _ratio(np.abs(weights @ gaps).sum(axis=1), weights.sum(axis=1))


def _auroc(truth: np.ndarray, probabilities: np.ndarray) -> float | None:
    present = np.unique(truth)
    if len(present) < 2:
        return None
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(truth, probabilities[:, 1]))
    labels = np.arange(probabilities.shape[1])
    if len(present) == len(labels):
        return float(roc_auc_score(truth, probabilities, multi_class="ovo", average="macro", labels=labels))
    # scikit-learn refuses classes without a row; their pairs do not exist.
    return float(aurocs(truth, probabilities, np.ones((1, len(truth))))[0])


def aurocs(truth: np.ndarray, probabilities: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One-versus-one AUROC of each resample, [B]: the mean over pairs of classes present of both directions.

    Args:
        truth: Class code, [U].
        probabilities: [U, K].
        weights: [B, U].
    """
    present = np.unique(truth)
    values = []
    for i, a in enumerate(present):
        for b in present[i + 1 :]:
            rows = (truth == a) | (truth == b)
            both = [
                _weighted_auc(probabilities[rows, c], truth[rows] == c, weights[:, rows])
                for c in ((b,) if probabilities.shape[1] == 2 else (a, b))
            ]
            values.append(np.mean(both, axis=0))
    return np.mean(values, axis=0) if values else np.full(len(weights), np.nan)


def _weighted_auc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted chance that a positive scores above a negative, ties half, [B]."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf) > 0)
    w = weights[:, order]
    up = np.add.reduceat(w * positive[order], starts, axis=1)
    down = np.add.reduceat(w * ~positive[order], starts, axis=1)
    below = np.cumsum(down, axis=1) - down
    return _ratio((up * (below + down / 2)).sum(axis=1), up.sum(axis=1) * down.sum(axis=1))
