"""The logistic regression against scikit-learn's, run to its own end: with its default tolerance it stops early."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_sample_weight

from latent_medi.statistics import logistic_regression
from latent_medi.statistics.logistic_regression import Problem, Scaling, Solution


def _patches(n: int, d: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features of classes that overlap, with a mean and a decaying spectrum as an encoder's have."""
    world, rng = np.random.default_rng(5), np.random.default_rng(seed)
    decay = np.arange(1, d + 1) ** -0.5
    mix, centres = world.normal(size=(d, d)) / np.sqrt(d), world.normal(size=(k, d)) * decay * 0.35
    codes = rng.integers(0, k, n)
    return ((centres[codes] + rng.normal(size=(n, d)) * decay) @ mix * 3 + 0.5).astype(np.float32), codes


def _judge(x: np.ndarray, codes: np.ndarray, c: float, weights: np.ndarray) -> LogisticRegression:
    return LogisticRegression(C=c, tol=1e-9, max_iter=50_000).fit(x.astype(np.float64), codes, weights)


def _predicted(found: Solution, x: np.ndarray) -> np.ndarray:
    logits = x @ found.weights.T + found.intercept
    return (logits[:, 0] > 0).astype(int) if logits.shape[1] == 1 else logits.argmax(axis=1)


@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("standard", [True, False])
@pytest.mark.parametrize("c", [1e-3, 1.0, 100.0])
def test_the_solution_is_scikit_learns(k: int, standard: bool, c: float) -> None:
    x, codes = _patches(700, 12, k, 0)
    weights = np.random.default_rng(1).uniform(0.2, 3.0, len(x))
    scaling = Scaling.standard(x) if standard else Scaling.none(12)
    found = Problem(x, codes, weights, scaling).solve(c, 5000)
    judge = _judge(StandardScaler().fit_transform(x.astype(np.float64)) if standard else x, codes, c, weights)
    assert found.converged
    assert found.weights == pytest.approx(judge.coef_, abs=2e-4 * np.abs(judge.coef_).max())
    apart = (found.intercept - found.intercept.mean()) - (judge.intercept_ - judge.intercept_.mean())
    assert np.abs(apart).max() < 1e-3 * max(1.0, np.abs(judge.coef_).max())


@pytest.mark.parametrize("k", [2, 5])
def test_accuracy_in_single_precision_is_scikit_learns(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic_regression, "_DOUBLE", 0)
    monkeypatch.setattr(logistic_regression, "_BLOCK", 700)  # several, the last one short
    monkeypatch.setattr(logistic_regression, "_GRAM_ROWS", 600)
    (x, codes), (test, truth) = _patches(3000, 24, k, 0), _patches(20_000, 24, k, 1)
    weights = compute_sample_weight("balanced", codes)
    found = Problem(x, codes, weights, Scaling.none(24)).solve(1.0, 5000)
    judge = _judge(x, codes, 1.0, weights)
    right = (_predicted(found, test) == truth).mean()
    assert right == pytest.approx((judge.predict(test.astype(np.float64)) == truth).mean(), abs=1e-4)
    assert 1 / k + 0.1 < right < 0.99
    assert found.converged
    assert found.iterations < 60


@pytest.mark.parametrize("k", [2, 5])
@pytest.mark.parametrize("mean", [100, 1000])
def test_a_mean_of_many_deviations_costs_no_accuracy(k: int, mean: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge sees the same single-precision numbers, about their mean and in double precision."""
    monkeypatch.setattr(logistic_regression, "_DOUBLE", 0)
    (x, codes), (test, truth) = _patches(3000, 24, k, 0), _patches(20_000, 24, k, 1)
    away = mean * x.std(axis=0)
    x, test = x + away, test + away
    weights, centre = compute_sample_weight("balanced", codes), x.mean(axis=0, dtype=np.float64)
    found = Problem(x, codes, weights, Scaling.none(24)).solve(1.0, 5000)
    judge = LogisticRegression(tol=1e-9, max_iter=50_000).fit(x - centre, codes, weights)
    assert found.converged
    assert found.weights == pytest.approx(judge.coef_, abs=4e-4 * np.abs(judge.coef_).max())
    right = (_predicted(found, test.astype(np.float64)) == truth).mean()
    assert right == pytest.approx((judge.predict(test - centre) == truth).mean(), abs=1e-4)


@pytest.mark.parametrize("k", [2, 3])
def test_weights_are_pulled_towards_others_by_the_objective(k: int) -> None:
    """With Σ loss·C + ½‖W − W₀‖², the gradient of the loss at the solution is (W₀ − W) / C; that of the intercept 0."""
    x, codes = _patches(400, 6, k, 0)
    weights, rng = np.ones(len(x)), np.random.default_rng(0)
    rows = 1 if k == 2 else k
    towards = rng.normal(size=(rows, 7))
    found = Problem(x, codes, weights, Scaling.none(6)).solve(0.05, 5000, towards=towards)
    logits = x @ found.weights.T + found.intercept
    if k == 2:
        residual = 1 / (1 + np.exp(-logits)) - codes[:, None]
    else:
        residual = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - np.eye(k)[codes]
    assert residual.T @ x == pytest.approx((towards[:, :-1] - found.weights) / 0.05, abs=1e-3)
    assert residual.sum(axis=0) == pytest.approx(np.zeros(rows), abs=1e-3)


def test_any_start_and_preconditioner_end_alike() -> None:
    x, codes = _patches(500, 8, 3, 0)
    problem = Problem(x, codes, np.ones(500), Scaling.none(8))
    first = problem.solve(1.0, 5000)
    again = problem.solve(1.0, 5000, start=np.column_stack([first.weights, first.intercept]))
    other = Problem(x, codes, np.ones(500), Scaling.none(8), gram=np.eye(8)).solve(1.0, 5000)
    assert again.iterations < first.iterations < other.iterations
    for found in (again, other):
        assert found.weights == pytest.approx(first.weights, abs=1e-4)


def test_dependent_features_of_a_large_scale_are_solved_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their Gram matrix is singular, and by rounding has eigenvalues below 0."""
    monkeypatch.setattr(logistic_regression, "_DOUBLE", 0)
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2, 2000)
    hidden = rng.normal(size=(2000, 10)) + codes[:, None] * 0.3
    x = (hidden @ rng.normal(size=(10, 128)) * 100).astype(np.float32)
    problem = Problem(x, codes, np.ones(2000), Scaling.none(128))
    assert np.linalg.eigvalsh(problem.gram)[0] < -1e-3
    found = problem.solve(1.0, 5000)
    judge = _judge(hidden, codes, 1e6, np.ones(2000))
    assert found.converged
    assert (_predicted(found, x) == judge.predict(hidden)).mean() > 0.995


def test_what_is_no_number_is_refused() -> None:
    x, codes = _patches(50, 4, 2, 0)
    x[7, 2] = np.nan
    with pytest.raises(ValueError, match="finite"):
        Problem(x, codes, np.ones(50), Scaling.none(4))


def test_a_constant_feature_keeps_its_scale() -> None:
    x = np.column_stack([np.full(50, 3.0), np.arange(50.0)])
    scaling = Scaling.standard(x)
    assert scaling.scale == pytest.approx([1.0, np.arange(50).std()])
    assert scaling.centre == pytest.approx([3.0, 24.5])
