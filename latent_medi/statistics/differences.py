"""An accuracy's two sources of chance, the test patients and the samples drawn; and differences of two accuracies.

A training set is built and scored R times, each time with another draw of n samples, without replacement, from a pool
of M. The pool itself is a sample of what the generator can draw. With f = n/M and σ² the variance that a draw of n from
the generator itself would have, repeats from one pool have variance s² = σ² (1 − f), and the mean over the whole pool
has variance σ² f around the generator's. Their mean over R repeats then has

    s² / R + σ² f = s² (1 / R + f / (1 − f)).

Where the pool of M is drawn from a finite population of N, its own variance is σ² f (1 − M/N) instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from latent_medi.statistics.intervals import Estimate, Interval, Spread, estimate, jackknife

LIKELY_LEVEL = 0.8
"""Level of the interval ``likely``."""
LARGEST_SHARE = 0.8
"""Above this share of a pool its draws are too much alike to tell what another pool would give."""
MIN_SEEDS = 3
"""Training seeds from which on a difference speaks of the method instead of the trained models."""
DRAWS_UNKNOWN = "the noise of the samples drawn is unknown: generate at least twice as many samples as are added"
ONE_REPEAT = "the noise of the samples drawn is unknown: it takes at least two repeats"


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """A difference and what it rests on. Its intervals hold for other patients and for other samples.

    Args:
        likely: Its 80 % interval; as ``interval`` otherwise.
        error_patients: Standard error over test patients; null where it is not known.
        error_draws: Standard error over the samples drawn, or over training seeds, besides what a draw changes for
            single patients, which ``error_patients`` contains; null where it is not known.
        over: What the difference speaks of: "trained models", whose samples were drawn several times; or "method",
            where each side that has samples of a model has them of three training seeds or more.
        training_seeds: Number of training seeds, 1 or more; the smaller one where both sides have samples of a model.
    """

    likely: Interval = None
    error_patients: float | None = None
    error_draws: float | None = None
    over: Literal["trained models", "method"] = "trained models"
    training_seeds: int = 1


def pool_factor(taken: float, pool: float, population: float = math.inf) -> float:
    """Variance of a pool's mean, relative to that between draws from it: f / (1 − f) · (1 − M/N).

    Args:
        taken: Samples that each draw takes, n.
        pool: Samples of the pool, M.
        population: What the pool was drawn from, N; infinite for samples of a generator, M where the pool is all that
            there is.

    Returns:
        0 or more; infinite where a draw takes more than ``LARGEST_SHARE`` of a pool that is not all that there is, and
        where it takes from an empty pool.
    """
    if taken == 0:
        return 0.0
    if pool == 0:
        return math.inf
    rest = max(0.0, 1.0 - pool / population)
    if rest == 0:
        return 0.0
    share = taken / pool
    return rest * share / (1 - share) if share <= LARGEST_SHARE else math.inf


@dataclass(frozen=True)
class Draws:
    """How the repeats of a training set came about.

    Args:
        pool: See :func:`pool_factor`; None where nothing depends on chance, so that one repeat says all.
        seeds: Training seed that the samples of each repeat belong to, [R].
        generated: Whether what is drawn are samples of a trained model.
    """

    pool: float | None
    seeds: Sequence[int]
    generated: bool = True

    @property
    def training_seeds(self) -> int:
        """Number of training seeds."""
        return len(set(self.seeds))

    @property
    def unknown(self) -> str | None:
        """Why the variance over draws is not known; None where it is."""
        if self.pool is None or self.training_seeds >= MIN_SEEDS:
            return None
        if math.isinf(self.pool):
            return DRAWS_UNKNOWN
        return ONE_REPEAT if len(self.seeds) <= self.training_seeds else None

    def spread(self, by_repeat: np.ndarray, left_out: np.ndarray, strata: np.ndarray) -> Spread:
        """Variance over draws of the mean of a score.

        What a draw changes for one patient and not for another is left out: the variance over patients has it already.
        With models of S ≥ 3 training seeds it is the variance between seeds, which contains that of the draws.

        Args:
            by_repeat: The score in each repeat, [R].
            left_out: The same without each test patient, [R, P].
            strata: Independent sample that each patient belongs to, [P].
        """
        if self.pool is None:
            return Spread(0.0)
        if self.unknown:
            return Spread(math.inf, 1.0)
        values, seeds, pool = np.column_stack([by_repeat, left_out]), np.asarray(self.seeds), self.pool
        names = np.unique(seeds)
        if len(names) >= MIN_SEEDS:
            values, pool = np.stack([values[seeds == seed].mean(axis=0) for seed in names]), 0.0
            seeds, names = np.zeros(len(names), int), names[:1] * 0
        changes = values - np.stack([values[seeds == seed].mean(axis=0) for seed in seeds])
        dof = len(values) - len(names)
        between = float((changes[:, 0] ** 2).sum()) / dof
        interaction = _patient_variance(changes[:, 1:], strata) / dof
        return Spread(max(0.0, between - interaction) * (pool / len(names) + 1 / len(values)), dof)


def _patient_variance(changes: np.ndarray, strata: np.ndarray) -> float:
    """The jackknife's variance of each row of [R, P], summed over rows; 0 where a value is not finite."""
    if not np.isfinite(changes).all():
        return 0.0
    total = 0.0
    for stratum in np.unique(strata):
        own = changes[:, strata == stratum]
        m = own.shape[1]
        total += (m - 1) / m * float(((own - own.mean(axis=1, keepdims=True)) ** 2).sum())
    return total


def with_draws(patients: Spread, draws: Sequence[Spread]) -> Spread:
    """Variance over patients and over draws together; infinite where one of them is not known."""
    parts = [patients, *draws]
    if any(math.isinf(part.variance) for part in parts):
        return Spread(math.inf, 1.0)
    return Spread.total(parts)


@dataclass(frozen=True)
class Scored:
    """One score of one training set, in every repeat.

    Args:
        draws: How the repeats came about.
        by_repeat: The score in each repeat, [R].
        left_out: The same without each test patient, [R, P].
        strata: Independent sample, such as the class, that each patient belongs to, [P].
    """

    draws: Draws
    by_repeat: np.ndarray
    left_out: np.ndarray
    strata: np.ndarray

    @property
    def value(self) -> float:
        """Mean over repeats."""
        return float(self.by_repeat.mean())

    @property
    def over_draws(self) -> Spread:
        """Variance over draws of the mean over repeats."""
        return self.draws.spread(self.by_repeat, self.left_out, self.strata)

    @property
    def spread(self) -> Spread:
        """Variance over patients and draws of the mean over repeats."""
        return with_draws(jackknife(self.left_out.mean(axis=0), self.strata), [self.over_draws])


def difference(
    first: Scored,
    second: Scored,
    n_patches: int,
    n_patients: int,
    smallest_group: int | None = None,
) -> Difference:
    """The difference first − second of a score, with its intervals over patients and draws.

    The variance over patients is paired: each patient is classified with both.

    Args:
        first, second: The score of the two training sets, for the same patients in the same order.
        n_patches, n_patients: What it rests on.
        smallest_group: See :class:`~latent_medi.statistics.intervals.Estimate`.
    """
    value = first.value - second.value
    patients = jackknife(first.left_out.mean(axis=0) - second.left_out.mean(axis=0), first.strata)
    spreads = [first.over_draws, second.over_draws]
    total = with_draws(patients, spreads)
    reason = first.draws.unknown or second.draws.unknown
    found = estimate(value, n_patches, n_patients, total, None, smallest_group, reason)
    likely = estimate(value, n_patches, n_patients, total, None, smallest_group, level=LIKELY_LEVEL)
    # Real patches and baselines without a generator have no training seed.
    seeds = min((side.draws.training_seeds for side in (first, second) if side.draws.generated), default=1)
    return Difference(
        **vars(found),
        likely=likely.interval,
        error_patients=_finite(patients.error),
        error_draws=_finite(math.sqrt(sum(spread.variance for spread in spreads))),
        over="method" if seeds >= MIN_SEEDS else "trained models",
        training_seeds=seeds,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
