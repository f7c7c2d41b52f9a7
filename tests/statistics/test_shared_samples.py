"""A mean over groups counts samples that several of them have once."""

from __future__ import annotations

import numpy as np
import pytest

from latent_medi.statistics.intervals import mean_of_shares, wilson
from latent_medi.statistics.shared_samples import Group, mean_over_groups


def group(rows: np.ndarray, hits: np.ndarray) -> Group:
    return Group(rows, np.where(hits, "a", "b"), np.full(len(rows), "a"))


def test_groups_without_common_samples_are_independent() -> None:
    hits = np.arange(40) % 4 > 0
    parts = [np.arange(10), np.arange(10, 40)]
    found = mean_over_groups([group(rows, hits[rows]) for rows in parts])
    assert found == mean_of_shares([int(hits[rows].sum()) for rows in parts], [10, 30])


def test_the_same_samples_twice_are_no_more_than_once() -> None:
    hits = np.arange(40) % 4 > 0
    found = mean_over_groups([group(np.arange(40), hits)] * 2)
    assert found.value == pytest.approx(0.75)
    assert found.n_patches == 40
    assert found.interval == pytest.approx(wilson(30, 40))


def test_one_sample_is_not_of_two_sites() -> None:
    """Samples of a class alone, of which two sites are asked: those found at either are the share."""
    found = np.array(["a"] * 10 + ["b"] * 20 + ["c"] * 10)
    groups = [Group(np.arange(40), found, np.full(40, site)) for site in ("a", "b")]
    mean = mean_over_groups(groups)
    assert mean.value == pytest.approx((10 / 40 + 20 / 40) / 2)
    low, high = wilson(30, 40) or (0.0, 0.0)
    assert mean.interval == pytest.approx((low / 2, high / 2))


def test_the_interval_holds_where_some_samples_are_shared() -> None:
    """Half of a group's samples are the other's, too: as if they were independent, it would be too narrow."""
    rng = np.random.default_rng(0)
    parts, covered, narrow, trials = [np.arange(60), np.arange(10, 70)], 0, 0, 2000
    for _ in range(trials):
        hits = rng.random(70) < 0.8
        found = mean_over_groups([group(rows, hits[rows]) for rows in parts])
        assert isinstance(found.interval, tuple)
        covered += found.interval[0] <= 0.8 <= found.interval[1]
        apart = mean_of_shares([int(hits[rows].sum()) for rows in parts], [60, 60]).interval
        assert isinstance(apart, tuple)
        narrow += apart[0] <= 0.8 <= apart[1]
    assert 0.935 < covered / trials < 0.975
    assert narrow / trials < 0.91
