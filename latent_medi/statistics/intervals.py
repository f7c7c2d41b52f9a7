"""Estimates and their 95 % intervals, from the values that an estimate has when each patient is left out in turn.

The variance is the jackknife's (Tukey 1958), summed over independent samples such as the patients of each class
(Arvesen 1969). The interval is Student's t, with degrees of freedom by Satterthwaite (1946), on the logit scale where
the quantity has a smallest and a largest value (Miller 1974). Nothing is drawn at random, so an interval has no seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from scipy import stats
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

MIN_PATIENTS = 10
"""Below this many patients an interval is "not estimable"."""
NOT_ESTIMABLE: Final = "not estimable"
LEVEL = 0.95
SHARE = (0.0, 1.0)
"""Range of a share."""
_ROUNDING = 1e-9
"""A share this near to 0 or 1 is 0 or 1: means of means are rounded."""

Interval = tuple[float, float] | Literal["not estimable"] | None


@dataclass(frozen=True)
class Estimate:
    """A number and what it rests on.

    Args:
        value: The number; ``None`` means not available.
        n_patches: Patches that it rests on.
        n_patients: Patients that it rests on; 0 for synthetic samples.
        interval: Its 95 % interval; ``NOT_ESTIMABLE`` with too few patients; ``None`` where none is computed.
        smallest_group: Patients of the smallest group (class, site, combination) of those that weigh the same.
        interval_over: "samples" where the interval takes samples for independent; otherwise it is over patients, and
            over draws where samples are drawn.
        reason: Why there is no value or no interval.
    """

    value: float | None
    n_patches: int
    n_patients: int
    interval: Interval
    smallest_group: int | None = None
    interval_over: Literal["samples"] | None = None
    reason: str | None = None

    def times(self, factor: float) -> Estimate:
        """The value and its interval times a positive factor, such as 100 for percent."""
        value = None if self.value is None else factor * self.value
        bounds = self.interval
        if isinstance(bounds, tuple):
            bounds = (factor * bounds[0], factor * bounds[1])
        return replace(self, value=value, interval=bounds)


@dataclass(frozen=True)
class Spread:
    """Variance of an estimate.

    Args:
        variance: The variance, 0 or more.
        dof: Its degrees of freedom; infinite where it is known.
    """

    variance: float
    dof: float = math.inf

    @property
    def error(self) -> float:
        """Standard error."""
        return math.sqrt(self.variance)

    @classmethod
    def total(cls, parts: Iterable[Spread]) -> Spread:
        """Variance of a sum of independent terms, with degrees of freedom by Satterthwaite (1946)."""
        found = [part for part in parts if part.variance > 0]
        variance = sum(part.variance for part in found)
        below = sum(part.variance**2 / part.dof for part in found)
        return cls(variance, variance**2 / below if below > 0 else math.inf)


def jackknife(left_out: np.ndarray, strata: np.ndarray | None = None) -> Spread:
    """Variance of an estimate from its values without each unit in turn.

    Args:
        left_out: Value without each patient (or sample), [n].
        strata: Independent sample that each belongs to, [n]; one by default. Strata of a single unit are joined, since
            one unit has no variance.

    Returns:
        Σ over strata of (m − 1)/m · Σ (value − mean)², m units each. Infinite variance where there are fewer than two
        units or a value is not finite: the estimate cannot do without a unit.
    """
    values = np.asarray(left_out, np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return Spread(math.inf, 1.0)
    codes = np.zeros(len(values), int) if strata is None else np.unique(strata, return_inverse=True)[1].reshape(-1)
    sizes = np.bincount(codes)
    single = sizes[codes] == 1
    if single.sum() == 1 and len(sizes) > 1:
        single |= codes == np.argmax(sizes)
    codes = np.unique(np.where(single, -1, codes), return_inverse=True)[1]
    parts = []
    for code in range(codes.max() + 1):
        own = values[codes == code]
        m = len(own)
        parts.append(Spread((m - 1) / m * float(((own - own.mean()) ** 2).sum()), m - 1))
    return Spread.total(parts)


def strata_of(present: np.ndarray) -> np.ndarray:
    """The independent sample that each patient belongs to, for :func:`jackknife`.

    Patients of different groups (classes, sites, combinations) are separate samples, unless some patient is in both:
    then leaving a patient out changes the means of both groups, and their patients are one sample.

    Args:
        present: Which groups each patient is in, bool [groups, patients].

    Returns:
        A code for each patient, [patients]: that of its connected component of groups.
    """
    n_groups, n_patients = present.shape
    if not present.size:
        return np.zeros(n_patients, int)
    group, patient = np.nonzero(present)
    links = coo_matrix((np.ones(len(group)), (group, n_groups + patient)), shape=(n_groups + n_patients,) * 2)
    codes: np.ndarray = np.unique(connected_components(links, directed=False)[1][n_groups:], return_inverse=True)[1]
    return codes


def t_interval(
    value: float, spread: Spread, within: tuple[float, float] | None = None, level: float = LEVEL
) -> tuple[float, float] | None:
    """Student's t interval; None where the spread is not known or nothing.

    Args:
        value: The estimate.
        spread: Its variance.
        within: Smallest and largest value that the quantity can have: the interval is symmetric on the logit scale of
            this range (for a correlation, from −1 to 1, that is Fisher's z). By default it is symmetric as it stands.
        level: Confidence level.
    """
    if not 0 < spread.variance < math.inf:
        return None
    reach = float(stats.t.ppf((1 + level) / 2, max(spread.dof, 1.0))) * spread.error
    if within is None:
        return value - reach, value + reach
    lowest, highest = within
    share = (value - lowest) / (highest - lowest)
    if not 0 < share < 1:
        return None
    place, reach = math.log(share / (1 - share)), reach / ((highest - lowest) * share * (1 - share))
    low, high = (lowest + (highest - lowest) / (1 + math.exp(-min(place + r, 700))) for r in (-reach, reach))
    return low, high


def estimate(
    value: float | None,
    n_patches: int,
    n_patients: int,
    spread: Spread | None = None,
    within: tuple[float, float] | None = None,
    smallest_group: int | None = None,
    reason: str | None = None,
    level: float = LEVEL,
) -> Estimate:
    """An estimate with its interval.

    Args:
        value: The number; ``None`` or NaN means not available.
        n_patches: Patches that it rests on.
        n_patients: Patients that it rests on.
        spread: Its variance over patients; without it there is no interval.
        within: See :func:`t_interval`. A share of 0 or 1 of ``SHARE``, on which all patients agree, gets Wilson's
            interval for the patients of the smallest group.
        smallest_group: Patients of the smallest of the groups (classes, sites, combinations) that weigh the same: the
            number is only as sure as that one.
        reason: Why there is no value or no interval.
        level: Confidence level.
    """
    value = None if value is None or not math.isfinite(value) else float(value)
    smallest = None if smallest_group is None else int(smallest_group)
    bounds: Interval = None
    if value is not None and spread is not None:
        fewest = n_patients if smallest is None else min(n_patients, smallest)
        if fewest < MIN_PATIENTS:
            bounds = NOT_ESTIMABLE
        elif within == SHARE and min(abs(value), abs(value - 1)) < _ROUNDING:
            value = float(round(value))
            bounds = NOT_ESTIMABLE if math.isinf(spread.variance) else wilson(round(value * fewest), fewest, level)
        else:
            bounds = t_interval(value, spread, within, level) or NOT_ESTIMABLE
            if spread.variance == 0:
                reason = reason or "all patients agree"
    return Estimate(value, int(n_patches), int(n_patients), bounds, smallest, None, reason)


def share_of_samples(hits: int, n: int, scale: float = 1.0) -> Estimate:
    """The share of ``n`` synthetic samples that ``hits`` of them are, times ``scale``, with Wilson's interval: samples
    are independent draws and have no patients.
    """
    return Estimate(hits / n if n else None, n, 0, wilson(hits, n), interval_over="samples").times(scale)


def mean_of_shares(hits: Sequence[int], n: Sequence[int]) -> Estimate:
    """The mean over groups of the share of a group's samples that are hits, every group weighing the same.

    The interval of one group is Wilson's; of more, that of a sum of independent shares by Price & Bonett (2004): Wald's
    after 2/groups hits and as many misses are added to each, cut at 0 and 1. It holds for shares near these, too.

    Args:
        hits: Samples of each group that are hits.
        n: Samples of each group, 1 or more.
    """
    if len(hits) == 1:
        return share_of_samples(hits[0], n[0])
    found, total, groups = np.asarray(hits, float), np.asarray(n, float), len(n)
    more = 2 / groups
    shares = (found + more) / (total + 2 * more)
    centre = float(shares.mean())
    reach = stats.norm.ppf((1 + LEVEL) / 2) * float((shares * (1 - shares) / (total + 2 * more)).sum()) ** 0.5 / groups
    bounds = max(centre - float(reach), 0.0), min(centre + float(reach), 1.0)
    return Estimate(float((found / total).mean()), int(total.sum()), 0, bounds, interval_over="samples")


def wilson(successes: int, n: int, level: float = LEVEL) -> tuple[float, float] | None:
    """Score interval of a share (Wilson 1927), for synthetic samples, which are independent and have no patients."""
    if n == 0:
        return None
    low, high = stats.binomtest(successes, n).proportion_ci(level, "wilson")
    return float(low), float(high)
