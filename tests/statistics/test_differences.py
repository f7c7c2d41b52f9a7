"""Variance over draws from a pool, over training seeds and over patients, by hand and against simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from latent_medi.statistics.differences import (
    DRAWS_UNKNOWN,
    ONE_REPEAT,
    Draws,
    Scored,
    difference,
    pool_factor,
)
from latent_medi.statistics.intervals import NOT_ESTIMABLE

NOBODY = np.zeros(1, int)


def alone(values: np.ndarray) -> np.ndarray:
    """Scores without the one patient, who changes nothing."""
    return np.repeat(values[:, None], 1, axis=1)


@pytest.mark.parametrize(("taken", "pool", "population"), [(20, 40, math.inf), (30, 50, math.inf), (20, 40, 60)])
def test_the_variance_over_draws_is_that_of_new_pools(taken: int, pool: int, population: float) -> None:
    """The score is the mean of the samples drawn; each study draws a new pool, and repeats from it."""
    rng = np.random.default_rng(0)
    everyone = rng.normal(size=60) if math.isfinite(population) else None
    found, estimated = [], []
    draws = Draws(pool_factor(taken, pool, population), [0] * 6)
    for _ in range(4000):
        samples = rng.normal(size=pool) if everyone is None else rng.permutation(everyone)[:pool]
        repeats = np.array([rng.permutation(samples)[:taken].mean() for _ in range(6)])
        found.append(repeats.mean())
        estimated.append(draws.spread(repeats, alone(repeats), NOBODY).variance)
    assert np.mean(estimated) == pytest.approx(np.var(found), rel=0.08)


def test_pool_factor_by_hand() -> None:
    assert pool_factor(10, 20) == 1.0
    assert pool_factor(10, 40) == pytest.approx(1 / 3)
    assert pool_factor(10, 40, 80) == pytest.approx(1 / 6)
    assert pool_factor(10, 20, 20) == pool_factor(90, 20, 20) == 0.0
    assert pool_factor(0, 20) == 0.0
    assert math.isinf(pool_factor(20, 20))
    assert math.isinf(pool_factor(19, 20))
    assert math.isinf(pool_factor(1, 0))
    assert pool_factor(0, 0) == 0.0


def test_what_is_not_known_is_said() -> None:
    repeats = np.array([0.5, 0.7])
    assert Draws(None, [0]).spread(repeats[:1], alone(repeats[:1]), NOBODY).variance == 0.0
    assert Draws(None, [0]).unknown is None
    for draws, reason in ((Draws(math.inf, [0, 0]), DRAWS_UNKNOWN), (Draws(1.0, [0]), ONE_REPEAT)):
        assert draws.unknown == reason
        assert math.isinf(draws.spread(repeats, alone(repeats), NOBODY).variance)


def test_two_seeds_have_a_pool_each_and_three_are_the_method() -> None:
    repeats = np.array([0.1, 0.5, 0.3, 0.9])
    spread = Draws(1.0, [0, 1, 0, 1]).spread(repeats, alone(repeats), NOBODY)
    within = (2 * 0.1**2 + 2 * 0.2**2) / 2
    assert spread.variance == pytest.approx(within * (1 / 2 + 1 / 4))
    assert spread.dof == 2
    repeats = np.array([0.1, 0.5, 0.3, 0.3, 0.7, 0.5])
    method = Draws(math.inf, [0, 1, 2, 0, 1, 2])
    spread = method.spread(repeats, alone(repeats), NOBODY)
    assert method.unknown is None
    assert spread.variance == pytest.approx(np.var([0.2, 0.6, 0.4], ddof=1) / 3)
    assert spread.dof == 2


def scored(right: np.ndarray, draws: Draws) -> Scored:
    """The mean over patients of values [R, P]."""
    total, n = right.sum(axis=1, keepdims=True), right.shape[1]
    return Scored(draws, right.mean(axis=1), (total - right) / (n - 1), np.zeros(n, int))


def test_a_difference_covers_other_patients_and_other_draws() -> None:
    """A draw changes all patients alike, and each in a way of his own, which is not counted twice."""
    rng = np.random.default_rng(1)
    n, pool, taken, repeats = 20, 30, 15, 8
    draws = Draws(pool_factor(taken, pool), [0] * repeats)
    found, patients, over_draws, covered, likely = [], [], [], 0, 0
    trials = 1500
    for _ in range(trials):
        effect = rng.normal(size=n) * 0.3

        def side(effect: np.ndarray = effect) -> Scored:
            samples, own = rng.normal(size=pool), rng.normal(size=(pool, n)) * 3
            rows = [rng.permutation(pool)[:taken] for _ in range(repeats)]
            return scored(np.stack([effect + samples[r].mean() + own[r].mean(axis=0) for r in rows]), draws)

        result = difference(side(), side(), 5 * n, n)
        assert result.error_patients is not None
        assert result.error_draws is not None
        assert isinstance(result.interval, tuple)
        assert isinstance(result.likely, tuple)
        found.append(result.value)
        patients.append(result.error_patients**2)
        over_draws.append(result.error_draws**2)
        covered += result.interval[0] <= 0 <= result.interval[1]
        likely += result.likely[0] <= 0 <= result.likely[1]
    assert np.mean(patients) + np.mean(over_draws) == pytest.approx(np.var(found), rel=0.1)
    assert covered / trials == pytest.approx(0.95, abs=0.02)
    assert likely / trials == pytest.approx(0.80, abs=0.04)


def test_no_interval_where_the_draws_are_not_known_or_patients_are_few() -> None:
    rng = np.random.default_rng(2)
    right = rng.random((4, 12))
    known, unknown = Draws(1.0, [0] * 4), Draws(math.inf, [0] * 4)
    both = scored(right, known), scored(right**2, unknown)
    for first, second in (both, both[::-1]):
        result = difference(first, second, 60, 12)
        assert (result.interval, result.likely, result.reason) == (NOT_ESTIMABLE, NOT_ESTIMABLE, DRAWS_UNKNOWN)
        assert result.error_patients is not None
        assert result.error_draws is None
        assert result.over == "trained models"
    few = difference(scored(right[:, :9], known), scored(right[:, :9] ** 2, known), 45, 9)
    assert few.interval == few.likely == NOT_ESTIMABLE
    seeds = Draws(math.inf, [0, 1, 2, 0])
    two, real = Draws(1.0, [0, 1, 0, 1]), Draws(1.0, [0] * 4, generated=False)
    for pair, over, n in [
        ((seeds, real), "method", 3),
        ((real, seeds), "method", 3),
        ((seeds, seeds), "method", 3),
        ((seeds, known), "trained models", 1),  # a method against one trained model
        ((two, seeds), "trained models", 2),
        ((known, real), "trained models", 1),
        ((real, real), "trained models", 1),
    ]:
        found = difference(scored(right, pair[0]), scored(right**2, pair[1]), 60, 12)
        assert (found.over, found.training_seeds) == (over, n)
