"""Neighbours that are searched in blocks are those of the whole matrix of distances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.statistics import neighbours


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 6), st.booleans(), st.integers(0, 2**32 - 1))
def test_neighbours_in_blocks_are_the_neighbours(n: int, m: int, k: int, groups: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(100, 1, (size, 5)).astype(np.float32) for size in (n, m))
    exclude = [(rng.integers(0, 3, n), rng.integers(0, 3, m))] if groups else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_QUERIES", 7)
        patch.setattr(neighbours, "_BANK", 6)
        distance, position = neighbours.nearest_neighbours(a, b, k, exclude)
    full = np.sqrt(((a[:, None].astype(float) - b[None]) ** 2).sum(2))
    for of_a, of_b in exclude:
        full[of_a[:, None] == of_b[None]] = np.inf
    expected = np.sort(full, axis=1)[:, : min(k, m)]
    np.testing.assert_allclose(distance, expected, rtol=1e-4)
    known = np.isfinite(distance)
    np.testing.assert_allclose(np.take_along_axis(full, position, 1)[known], distance[known], rtol=1e-6)


def test_cosine_distances_in_blocks_are_the_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = (neighbours.normalise(rng.normal(size=(n, 6)).astype(np.float32)) for n in (41, 57))
    of_a, of_b = rng.integers(0, 4, 41), rng.integers(0, 4, 57)
    of_b[of_b == 3] = 2
    whole = 1.0 - a.astype(np.float64) @ b.T.astype(np.float64)
    monkeypatch.setattr(neighbours, "_QUERIES", 7)
    monkeypatch.setattr(neighbours, "_BANK", 11)
    assert neighbours.nearest_cosine_distance(a, b) == pytest.approx(whole.min(1), abs=1e-7)
    masked = np.where(of_a[:, None] == of_b[None], np.inf, whole)
    assert neighbours.nearest_cosine_distance(a, b, [(of_a, of_b)]) == pytest.approx(masked.min(1), abs=1e-7)
    alone = neighbours.nearest_cosine_distance(a[:3], a[:3], [(np.arange(3), np.arange(3)), (np.zeros(3), np.zeros(3))])
    assert np.isinf(alone).all()
    assert (neighbours.nearest_cosine_distance(a, np.concatenate([b, a])) == 0).all()  # exactly: a copy is a copy


def test_near_duplicates_are_those_of_rows_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    a, b = (neighbours.normalise(rng.normal(size=(n, 6)).astype(np.float32)) for n in (41, 57))
    monkeypatch.setattr(neighbours, "_QUERIES", 7)
    monkeypatch.setattr(neighbours, "_BANK", 11)
    points = np.concatenate([a, a[:9] + np.float32(1e-4), b])
    neighbours.normalise(points)
    kept: list[int] = []
    for i in range(len(points)):
        distances = [0.5 * ((points[i].astype(float) - points[j]) ** 2).sum() for j in kept]
        if not distances or min(distances) >= 0.05:
            kept.append(i)
    assert np.flatnonzero(neighbours.without_near_duplicates(points, 0.05)).tolist() == kept
    assert len(kept) < len(points) - 9


def test_squared_distances_to_centroids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_BANK", 11)
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(25, 6)).astype(np.float32), rng.normal(size=(3, 6))
    expected = ((a[:, None].astype(float) - b[None]) ** 2).sum(2)
    np.testing.assert_allclose(neighbours.squared_distances(a, b), expected, rtol=1e-12)
