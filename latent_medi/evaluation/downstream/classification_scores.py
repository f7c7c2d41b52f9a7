"""Scores of class probabilities per patch, slide and patient, each with an interval over patients.

Points equal scikit-learn's where it has the score. Intervals come from the scores without each patient in turn; the
patients of each class (or set of classes) are taken for a sample of their own.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from sklearn.metrics import balanced_accuracy_score

from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream.records import (
    ClassificationScores,
    ScopedScores,
    ScoredPatches,
    ScoresByUnit,
    SmallGroup,
    WorstGroup,
)
from latent_medi.statistics import left_out
from latent_medi.statistics.intervals import (
    LEVEL,
    MIN_PATIENTS,
    SHARE,
    Estimate,
    Spread,
    estimate,
    jackknife,
    strata_of,
)
from latent_medi.statistics.left_out import Score

BINS = 15
"""Bins of equal width for the calibration error."""


@dataclass
class Units:
    """Patches, slides or patients, each with one class and site.

    Args:
        truth: Class code of each unit, [U].
        sites: Site of each unit, [U].
        patients: Patient code of each unit, [U].
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
        patients: Patient code of each test patch, [n_test].
    """

    def __init__(self, study: Study, codes: np.ndarray, shift: np.ndarray, patients: np.ndarray) -> None:
        self.classes, self.shift = study.classes, shift
        units = (field.name for field in dataclasses.fields(ScoresByUnit))
        self.groupings = {unit: Grouping.by(unit, study, codes, patients) for unit in units}

    def score(self, probabilities: np.ndarray) -> ScoresByUnit:
        """Scores of probabilities [n_test, K], whose rows sum to 1."""
        return ScoresByUnit(**{unit: self._scopes(g, probabilities) for unit, g in self.groupings.items()})

    def _scopes(self, grouping: Grouping, probabilities: np.ndarray) -> ScopedScores:
        mean, units = grouping.mean(probabilities), grouping.units
        shifted = np.zeros(len(units), bool)
        shifted[grouping.group[self.shift]] = True  # a unit has one site, so all of its patches are shifted or none
        score = partial(unit_scores, classes=self.classes)
        return ScopedScores(score(mean[shifted], units[shifted]), score(mean, units))


def unit_scores(probabilities: np.ndarray, units: Units, classes: Sequence[str]) -> ClassificationScores:
    """Every score of some units.

    Args:
        probabilities: [U, K].
        units: The units.
        classes: Class values, K.
    """
    truth, n = units.truth, len(units)
    if n == 0:
        nothing = estimate(None, 0, 0)
        return ClassificationScores(0, nothing, nothing, nothing, nothing, nothing, nothing, _no_group([]))
    predicted = probabilities.argmax(axis=1)
    patients = np.unique(units.patients, return_inverse=True)[1]
    of_class, cell, cell_weights = _groups(truth, units.sites)
    by_class, by_cell = _presence(of_class, patients), _presence(cell, patients)
    classes_of, cells_of = strata_of(by_class), strata_of(by_cell)
    n_patches, n_patients = int(units.counts.sum()), by_class.shape[1]
    right = (predicted == truth).astype(float)

    def score(
        found: Score,
        strata: np.ndarray,
        smallest: np.ndarray | None = None,
        within: tuple[float, float] = SHARE,
        share: bool = False,
    ) -> Estimate:
        fewest = None if smallest is None else int(smallest.sum(axis=1).min())
        # At the end of its range only a share of patches has Wilson's interval; another score has none.
        limits = within if share or found.value not in within else None
        return estimate(found.value, n_patches, n_patients, jackknife(found.left_out, strata), limits, fewest)

    balanced = left_out.mean_of_groups(right, of_class, np.full(len(by_class), 1 / len(by_class)), patients)
    by_site = left_out.mean_of_groups(right, cell, cell_weights, patients)
    squares = ((probabilities - np.eye(len(classes))[truth]) ** 2).sum(axis=1)
    return ClassificationScores(
        n_units=n,
        balanced_accuracy=score(balanced, classes_of, by_class, share=True),
        site_averaged_accuracy=score(by_site, cells_of, by_cell, share=True),
        mcc=score(left_out.correlation(truth, predicted, len(classes), patients), classes_of, within=(-1.0, 1.0)),
        auroc=score(left_out.pairwise_auroc(truth, probabilities, patients), classes_of, by_class),
        ece=score(left_out.calibration_error(probabilities, truth, patients, BINS), classes_of),
        brier=score(left_out.mean(squares, patients), classes_of, within=(0.0, 2.0)),
        worst_group=worst_group(predicted, units, classes),
    )


def _groups(truth: np.ndarray, sites: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Code of the class and of the class × site cell of each unit, [U], among those present; and the weight of each
    cell in the mean over sites of the mean over their classes.
    """
    of_class, site = (np.unique(values, return_inverse=True)[1] for values in (truth, sites))
    cells, cell = np.unique(np.column_stack([site, of_class]), axis=0, return_inverse=True)
    per_site = np.bincount(cells[:, 0])
    return of_class, cell.reshape(-1), 1 / (len(per_site) * per_site[cells[:, 0]])


def _presence(groups: np.ndarray, patients: np.ndarray) -> np.ndarray:
    """Which patients have a row of each group, bool [G, P]."""
    found = np.zeros((groups.max() + 1, patients.max() + 1), bool)
    found[groups, patients] = True
    return found


def worst_group(predicted: np.ndarray, units: Units, classes: Sequence[str]) -> WorstGroup:
    """The class × site group with the lowest accuracy; ``predicted`` are class codes [U], the rest as in
    :func:`unit_scores`.

    A group's accuracy is averaged over patients first. Groups of fewer than 10 patients are listed, not scored. The
    group was chosen among several because it is the lowest, so its interval has a level at which the intervals of all
    hold together (Bonferroni): 1 − 0.05 / groups.
    """
    right = (predicted == units.truth).astype(float)
    rows = pd.DataFrame({"class": units.truth, "site": units.sites, "patient": units.patients})
    rows["right"], rows["patches"] = right, units.counts
    by_patient = rows.groupby(["class", "site", "patient"], sort=True).agg(
        right=("right", "mean"), n=("patches", "sum")
    )
    small: list[SmallGroup] = []
    groups: list[tuple[str, np.ndarray, int]] = []
    for (code, site), found in by_patient.groupby(level=["class", "site"], sort=True):
        label = f"{classes[code]} × {site}"
        if len(found) < MIN_PATIENTS:
            small.append(SmallGroup(label, len(found)))
        else:
            groups.append((label, found["right"].to_numpy(float), int(found["n"].sum())))
    if not groups:
        return _no_group(small)
    label, means, n_patches = min(groups, key=lambda group: group[1].mean())
    spread = Spread(float(means.var(ddof=1)) / len(means), len(means) - 1)
    level = 1 - (1 - LEVEL) / len(groups)
    found = estimate(float(means.mean()), n_patches, len(means), spread, SHARE, level=level)
    return WorstGroup(**vars(found), group=label, n_groups=len(groups), not_estimable=small)


def _no_group(small: list[SmallGroup]) -> WorstGroup:
    return WorstGroup(**vars(estimate(None, 0, 0)), group=None, n_groups=0, not_estimable=small)


def quiet_balanced(truth: np.ndarray, predicted: np.ndarray) -> float:
    """scikit-learn's balanced accuracy over the classes present in the truth, without its warning of others."""
    with warnings.catch_warnings():  # a class that is predicted but not present is no error
        warnings.simplefilter("ignore", UserWarning)
        return float(balanced_accuracy_score(truth, predicted))


def site_averaged(truth: np.ndarray, predicted: np.ndarray, sites: np.ndarray) -> float:
    """Mean over sites of the balanced accuracy over the classes that a site has."""
    return float(np.mean([quiet_balanced(truth[sites == s], predicted[sites == s]) for s in np.unique(sites)]))


def scored_patches(study: Study, rows: np.ndarray) -> ScoredPatches:
    """What a protocol scores: some real rows."""
    table = study.index.iloc[rows]
    return ScoredPatches(len(table), int(table["patient"].nunique()), sorted(set(table[study.site_field].astype(str))))
