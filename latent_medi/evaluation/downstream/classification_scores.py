"""Scores of class probabilities per patch, slide and patient, each with an interval over patients.

Points are scikit-learn's where it has the score. Intervals weigh patients instead of repeating rows, all resamples at
once, which is why each score has a weighted form here; with every weight 1 it equals the point.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef, roc_auc_score

from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.records import (
    ClassificationScores,
    ScopedScores,
    ScoresByUnit,
    SmallGroup,
    WorstGroup,
)
from latent_medi.statistics.bootstrap import PatientResamples, estimate
from latent_medi.statistics.intervals import MIN_PATIENTS, NOT_ESTIMABLE, Estimate

BINS = 15
"""Bins of equal width for the calibration error."""


@dataclass
class Units:
    """Patches, slides or patients, each with one class and site.

    Args:
        truth: Class code of each unit, [U].
        sites: Site of each unit, [U].
        patients: Patient code of each unit, into the resamples' names, [U].
        counts: Patches of each unit, [U].
    """

    truth: np.ndarray
    sites: np.ndarray
    patients: np.ndarray
    counts: np.ndarray

    def __getitem__(self, keep: np.ndarray) -> Units:
        return Units(self.truth[keep], self.sites[keep], self.patients[keep], self.counts[keep])

    def __len__(self) -> int:
        return len(self.truth)


@dataclass
class Grouping:
    """Test patches grouped into units.

    Args:
        group: Unit of each test patch, [n_test].
        units: The units.
    """

    group: np.ndarray
    units: Units

    @classmethod
    def by(cls, unit: str, study: Study, codes: np.ndarray, patients: np.ndarray) -> Grouping:
        """Test patches by "patch", "slide" or "patient".

        A slide or patient with several classes or sites is a unit for each of them, since no single answer would be
        right.

        Args:
            unit: "patch", "slide" or "patient".
            study: The cohort.
            codes: Class code of each test patch.
            patients: Patient code of each test patch.
        """
        sites = study.site_labels[study.test]
        if unit == "patch":
            return cls(np.arange(len(codes)), Units(codes, sites, patients, np.ones(len(codes), int)))
        names = study.index[unit].to_numpy(str)[study.test]
        # A slide's name may recur with another patient.
        table = pd.DataFrame({"patient": patients, "name": names, "class": codes, "site": sites})
        group = table.groupby(list(table.columns), sort=True).ngroup().to_numpy()
        first = np.unique(group, return_index=True)[1]
        counts = np.bincount(group, minlength=len(first))
        return cls(group, Units(codes[first], sites[first], patients[first], counts))

    def mean(self, probabilities: np.ndarray) -> np.ndarray:
        """Mean probability over the patches of each unit: [n_test, K] to [U, K]."""
        sums = np.zeros((len(self.units), probabilities.shape[1]))
        np.add.at(sums, self.group, probabilities)
        return np.asarray(sums / self.units.counts[:, None])


class UnitScorer:
    """Scores per patch, slide and patient, over all test patches and over those under shift.

    Args:
        study: The cohort.
        codes: Class code of each test patch, [n_test].
        shift: Which test patches come from a site with a held-out combination, bool [n_test].
        bootstrap: Resamples of the test patients.
    """

    def __init__(self, study: Study, codes: np.ndarray, shift: np.ndarray, bootstrap: PatientResamples) -> None:
        self.classes, self.shift, self.weights = study.classes, shift, bootstrap.weights
        units = (field.name for field in dataclasses.fields(ScoresByUnit))
        self.groupings = {unit: Grouping.by(unit, study, codes, bootstrap.codes) for unit in units}

    def score(self, probabilities: np.ndarray) -> ScoresByUnit:
        """Scores of probabilities [n_test, K], whose rows sum to 1."""
        return ScoresByUnit(**{unit: self._scopes(g, probabilities) for unit, g in self.groupings.items()})

    def _scopes(self, grouping: Grouping, probabilities: np.ndarray) -> ScopedScores:
        mean, units = grouping.mean(probabilities), grouping.units
        shifted = np.zeros(len(units), bool)
        shifted[grouping.group[self.shift]] = True  # a unit has one site, so all of its patches are shifted or none
        score = partial(unit_scores, classes=self.classes, weights=self.weights)
        return ScopedScores(score(mean[shifted], units[shifted]), score(mean, units))


def unit_scores(
    probabilities: np.ndarray, units: Units, classes: Sequence[str], weights: np.ndarray
) -> ClassificationScores:
    """Every score of some units.

    Args:
        probabilities: [U, K].
        units: The units.
        classes: Class values, K.
        weights: Patient weights, [B, P].
    """
    truth, sites, n = units.truth, units.sites, len(units)
    if n == 0:
        nothing = estimate(None, 0, 0)
        return ClassificationScores(0, nothing, nothing, nothing, nothing, nothing, nothing, _no_group([]))
    predicted = probabilities.argmax(axis=1)
    w = weights[:, units.patients]
    squares = ((probabilities - np.eye(len(classes))[truth]) ** 2).sum(axis=1)
    places = np.unique(np.column_stack([truth, np.unique(sites, return_inverse=True)[1], units.patients]), axis=0)
    by_class, by_site = _fewest(places[:, [0, 2]]), _fewest(places)
    n_patches, n_patients = int(units.counts.sum()), len(np.unique(units.patients))

    def score(
        value: float | None, draws: np.ndarray, lowest: float = 0.0, highest: float = 1.0, **how: Any
    ) -> Estimate:
        found = estimate(value, n_patches, n_patients, draws, lowest=lowest, highest=highest, **how)
        if isinstance(found.interval, tuple) and found.interval[0] == found.interval[1]:
            return dataclasses.replace(found, interval=NOT_ESTIMABLE, reason="all patients agree")
        return found

    balanced = _recalls(truth, predicted, w).mean(axis=1)
    by_sites = _site_averages(truth, predicted, sites, w)
    error = float(calibration_errors(probabilities, truth, np.ones((1, n)))[0])
    return ClassificationScores(
        n_units=n,
        balanced_accuracy=score(quiet_balanced(truth, predicted), balanced, smallest_group=by_class, rate=True),
        site_averaged_accuracy=score(
            site_averaged(truth, predicted, sites), by_sites, smallest_group=by_site, rate=True
        ),
        mcc=score(
            float(matthews_corrcoef(truth, predicted)), correlations(truth, predicted, len(classes), w), lowest=-1.0
        ),
        auroc=score(_auroc(truth, probabilities), aurocs(truth, probabilities, w), smallest_group=by_class),
        # |gap| is raised by resampling, since the gaps of a resample do not cancel.
        ece=score(error, calibration_errors(probabilities, truth, w), recentre=True),
        brier=score(float(squares.mean()), _ratio(w @ squares, w.sum(axis=1)), highest=2.0),
        worst_group=worst_group(predicted, units, classes, weights),
    )


def _fewest(rows: np.ndarray) -> int:
    """Of rows [n, k] that end in a patient: the fewest different patients of any group that the other columns name."""
    groups = np.unique(rows, axis=0)[:, :-1]
    return int(np.unique(groups, axis=0, return_counts=True)[1].min())


def worst_group(predicted: np.ndarray, units: Units, classes: Sequence[str], weights: np.ndarray) -> WorstGroup:
    """The class × site group with the lowest accuracy; ``predicted`` are class codes [U], the rest as in
    :func:`unit_scores`.

    A group's accuracy is averaged over patients first; a resample's value is the lowest among the same groups. Groups
    of fewer than 10 patients are listed, not scored. The lowest of several estimates lies below the lowest truth, and
    the lowest of several resampled ones below that: the interval is moved back to the value, which keeps its own bias.
    """
    right = (predicted == units.truth).astype(float)
    groups: list[tuple[str, float, np.ndarray]] = []
    small: list[SmallGroup] = []
    n_patches, patients, sizes = 0, set[int](), list[int]()
    for code, name in enumerate(classes):
        for site in np.unique(units.sites):
            rows = np.flatnonzero((units.truth == code) & (units.sites == site))
            here, inverse = np.unique(units.patients[rows], return_inverse=True)
            label = f"{name} × {site}"
            if 0 < len(here) < MIN_PATIENTS:
                small.append(SmallGroup(label, len(here)))
            elif len(here):
                means = np.bincount(inverse, right[rows]) / np.bincount(inverse)
                w = weights[:, here]
                groups.append((label, float(means.mean()), _ratio(w @ means, w.sum(axis=1))))
                n_patches += int(units.counts[rows].sum())
                patients |= set(here.tolist())
                sizes.append(len(here))
    if not groups:
        return _no_group(small)
    label, value, _ = min(groups, key=lambda group: group[1])
    every = np.stack([group[2] for group in groups])
    draws = np.where(np.isnan(every).any(axis=0), np.nan, every.min(axis=0))
    limits = {"recentre": True, "lowest": 0.0, "highest": 1.0, "rate": True, "smallest_group": min(sizes)}
    found = estimate(value, n_patches, len(patients), draws, **limits)  # type: ignore[arg-type]
    return WorstGroup(**vars(found), group=label, n_groups=len(groups), not_estimable=small)


def _no_group(small: list[SmallGroup]) -> WorstGroup:
    return WorstGroup(**vars(estimate(None, 0, 0)), group=None, n_groups=0, not_estimable=small)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b > 0))


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
        return np.asarray(np.nanmean(np.stack(parts, axis=1), axis=1))


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
    return np.asarray(np.divide(over, under, out=np.zeros(len(over)), where=under > 0))


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
