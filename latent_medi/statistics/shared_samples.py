"""The mean over groups of the share of samples that are hits, where groups may have samples in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from latent_medi.statistics.intervals import LEVEL, Estimate, mean_of_shares, wilson


@dataclass(frozen=True)
class Group:
    """Samples of one group.

    Args:
        rows: Row of each sample, by which it is known in other groups, [n], n ≥ 1.
        found: What was found in each, [n].
        requested: What makes it a hit, [n].
    """

    rows: np.ndarray
    found: np.ndarray
    requested: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """Whether each is a hit, [n]."""
        return np.asarray(self.found == self.requested)


def mean_over_groups(groups: Sequence[Group]) -> Estimate:
    """The mean over groups of the share of a group's samples that are hits, every group weighing the same.

    Without common samples it is :func:`~latent_medi.statistics.intervals.mean_of_shares`. Otherwise each sample
    contributes the sum of its parts in all groups. Samples of the same groups are a stratum; their contributions lie
    between 0 and what a sample has where it is a hit in as many as it can be. As there, 2/strata samples at either end
    are added to each stratum (Price & Bonett 2004), a single stratum of shares gets Wilson's interval, and the interval
    is cut at 0 and at the largest mean.

    Args:
        groups: One or more.
    """
    rows, place = np.unique(np.concatenate([group.rows for group in groups]), return_inverse=True)
    parts = np.split(place.reshape(-1), np.cumsum([len(group.rows) for group in groups])[:-1])
    if len(rows) == len(place):
        return mean_of_shares([int(group.hits.sum()) for group in groups], [len(group.rows) for group in groups])
    member = np.zeros((len(rows), len(groups)), bool)
    value, largest = np.zeros(len(rows)), np.zeros(len(rows))
    could: dict[str, np.ndarray] = {}
    for i, (group, where) in enumerate(zip(groups, parts, strict=True)):
        weight = 1.0 / (len(groups) * len(where))
        member[where, i] = True
        value[where] += weight * group.hits
        for wanted in np.unique(group.requested):
            own = could.setdefault(str(wanted), np.zeros(len(rows)))
            own[where[group.requested == wanted]] += weight
    for own in could.values():
        largest = np.maximum(largest, own)
    # Samples of the same groups in which other values were requested have another end.
    _, stratum = np.unique(np.column_stack([member, largest]), axis=0, return_inverse=True)
    stratum = stratum.reshape(-1)
    sizes = np.bincount(stratum)
    end = np.bincount(stratum, largest) / sizes
    mean = float(value.sum())
    if len(sizes) == 1 and np.isin(np.round(value / end[0], 9), (0.0, 1.0)).all():
        low, high = wilson(round(mean / end[0]), len(rows)) or (0.0, 1.0)
        bounds = low * end[0] * len(rows), high * end[0] * len(rows)
    else:
        more = 2 / len(sizes)
        total = sizes + 2 * more
        centre = (np.bincount(stratum, value) + more * end) / total
        variance = (np.bincount(stratum, value**2) + more * end**2) / total - centre**2
        reach = float(stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt((sizes**2 * variance / total).sum()))
        middle = float((sizes * centre).sum())
        bounds = max(middle - reach, 0.0), min(middle + reach, float(largest.sum()))
    return Estimate(mean, len(rows), 0, (float(bounds[0]), float(bounds[1])), interval_over="samples")
