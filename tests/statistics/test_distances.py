"""Distances agree with independent computations and refuse what they cannot estimate."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.statistics.distances import (
    FeatureStatistics,
    fd_infinity,
    frechet_distance,
    full_rank,
    pca_basis,
    pca_dims,
)
from latent_medi.statistics.kernel_distance import kid


def _correlated(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(seed % 3).normal(size=(d, d))
    return rng.normal(size=(n, d)) @ mix + shift


def test_frechet_equals_an_independent_computation() -> None:
    a, b = _correlated(300, 20, 1), _correlated(260, 20, 2, 0.5)
    sa, sb = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(sa @ sb).real
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(sa + sb - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_equals_torch_fidelity_on_float32_features() -> None:
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    import torch

    a, b = _correlated(400, 24, 3).astype(np.float32), _correlated(350, 24, 4, 0.3).astype(np.float32)
    theirs = metric_fid.fid_statistics_to_metric(
        metric_fid.fid_features_to_statistics(torch.from_numpy(a)),
        metric_fid.fid_features_to_statistics(torch.from_numpy(b)),
        False,
    )
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


@pytest.mark.parametrize(("n", "m"), [(12, 15), (12, 300), (300, 12), (2, 39)])
def test_frechet_of_few_samples_is_that_of_their_moments(n: int, m: int) -> None:
    """Where a covariance [d, d] is not needed, it gives the same."""
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=(n, 40)) + 0.3, rng.normal(size=(m, 40)) * 1.2
    moments = frechet_distance(FeatureStatistics.of(a), FeatureStatistics.of(b))
    assert frechet_distance(a, b) == pytest.approx(moments, rel=1e-5)


def test_frechet_of_a_known_shift() -> None:
    rng = np.random.default_rng(0)
    a, shift = rng.normal(size=(200_000, 3)), np.array([2.0, 0, 0])
    assert frechet_distance(a, rng.normal(size=(200_000, 3)) + shift) == pytest.approx(4.0, rel=0.01)
    assert frechet_distance(a, a + shift) == pytest.approx(4.0, rel=1e-9)
    assert frechet_distance(a, 3 * a) == pytest.approx(np.trace(np.cov(a.T)) * 4 + 4 * (a.mean(0) ** 2).sum(), rel=1e-9)


def test_kid_equals_the_naive_formula() -> None:
    a, b = _correlated(17, 6, 5), _correlated(13, 6, 6, 0.2)

    def k(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / 6 + 1) ** 3

    naive = (
        sum(k(a[i], a[j]) for i in range(17) for j in range(17) if i != j) / (17 * 16)
        + sum(k(b[i], b[j]) for i in range(13) for j in range(13) if i != j) / (13 * 12)
        - 2 * sum(k(x, y) for x in a for y in b) / (17 * 13)
    )
    assert kid(a, b) == pytest.approx(naive, rel=1e-10)


def test_kid_is_unbiased_and_takes_float16() -> None:
    a, b = _correlated(300, 8, 0), _correlated(300, 8, 3)
    rng = np.random.default_rng(0)
    null = [kid(rng.normal(size=(60, 8)), rng.normal(size=(60, 8))) for _ in range(60)]
    assert abs(np.mean(null)) < 4 * np.std(null) / np.sqrt(60)
    assert np.isfinite(kid((a * 20).astype(np.float16), (b * 20).astype(np.float16)))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 1000))
def test_streaming_statistics_equal_one_pass(sizes: list[int], seed: int) -> None:
    x = np.random.default_rng(seed).normal(1e3, 1.0, size=(sum(sizes) + 2, 4))
    parts = np.split(x, np.cumsum(sizes))
    streamed = FeatureStatistics(4)
    for part in parts:
        streamed.update(part)
    assert streamed.n == len(x)
    np.testing.assert_allclose(streamed.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.cov, np.cov(x.T), rtol=1e-9, atol=1e-10)


def test_full_pca_changes_no_distance() -> None:
    a, b = _correlated(200, 10, 1), _correlated(200, 10, 2, 1.0)
    basis = pca_basis(_correlated(300, 10, 4))
    assert frechet_distance(basis.project(a, 10), basis.project(b, 10)) == pytest.approx(
        frechet_distance(a, b), rel=1e-8
    )
    spread = basis.project(_correlated(300, 10, 4), 10).var(axis=0)
    assert (np.diff(spread) <= 1e-9).all()


def test_the_distance_for_endless_samples_has_no_bias_of_their_number() -> None:
    """Two samplings of one distribution: the plain distance falls with n, the extrapolated one is the same."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, 12))
    reference = rng.normal(size=(40_000, 12)) @ mixing
    plain, endless = {}, {}
    for n in (300, 3000):
        samples = [rng.normal(size=(n, 12)) @ mixing for _ in range(8)]
        plain[n] = np.mean([frechet_distance(reference, sample) for sample in samples])
        found = [fd_infinity(reference, sample, seed=1) for sample in samples]
        endless[n] = np.mean([pair[0] for pair in found if pair])
        assert all(pair and pair[1] > 0 for pair in found)
    assert plain[300] > 5 * plain[3000]
    assert abs(endless[300]) < plain[300] / 2
    assert abs(endless[3000]) < plain[3000] / 2
    assert fd_infinity(reference, reference[:47]) is None


def test_how_many_samples_a_distance_needs() -> None:
    assert full_rank(40, 20)
    assert not full_rank(39, 20)
    assert pca_dims(39, 20) == 9
    assert pca_dims(3, 20) == 1
    assert pca_dims(4000, 20) == 20
