"""The jackknife, Student's t on the logit scale, and what has no interval."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from latent_medi.statistics.intervals import (
    NOT_ESTIMABLE,
    SHARE,
    Estimate,
    Spread,
    estimate,
    jackknife,
    mean_of_shares,
    share_of_samples,
    strata_of,
    t_interval,
    wilson,
)


def test_the_jackknife_of_a_mean_is_its_variance() -> None:
    values = np.random.default_rng(0).normal(size=12)
    found = jackknife((values.sum() - values) / 11)
    assert found.variance == pytest.approx(values.var(ddof=1) / 12)
    assert found.dof == pytest.approx(11)


def test_independent_samples_add_their_variances() -> None:
    """A difference of two means is Welch's: also its degrees of freedom."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=8), rng.normal(0, 3, 15)
    left_out = np.concatenate([(a.sum() - a) / 7 - b.mean(), a.mean() - (b.sum() - b) / 14])
    found = jackknife(left_out, np.repeat([0, 1], [8, 15]))
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
    assert t_interval(float(a.mean() - b.mean()), found) == pytest.approx((low, high))


def test_a_single_unit_joins_another_sample() -> None:
    values = np.array([1.0, 3.0, 5.0, 9.0])
    assert jackknife(values, np.array([0, 0, 0, 1])) == jackknife(values)
    two = jackknife(values, np.array([0, 0, 1, 2]))
    assert two == jackknife(values, np.array([0, 0, 1, 1]))


@pytest.mark.parametrize("values", [[0.5], [0.5, math.nan, 0.4]])
def test_what_cannot_do_without_a_unit_has_no_known_variance(values: list[float]) -> None:
    found = jackknife(np.array(values))
    assert found.variance == math.inf
    assert estimate(0.5, 90, 30, found).interval == NOT_ESTIMABLE


def test_a_bounded_interval_is_symmetric_on_its_scale_and_stays_inside() -> None:
    spread = Spread(0.02**2, 9)
    low, high = t_interval(0.97, spread, SHARE)  # type: ignore[misc]
    reach = stats.t.ppf(0.975, 9) * 0.02 / (0.97 * 0.03)
    assert math.log(0.97 / 0.03) - math.log(low / (1 - low)) == pytest.approx(reach)
    assert math.log(high / (1 - high)) - math.log(0.97 / 0.03) == pytest.approx(reach)
    assert 0 < low < 0.97 < high < 1
    # From −1 to 1 this is Fisher's z.
    low, high = t_interval(0.9, spread, (-1.0, 1.0))  # type: ignore[misc]
    assert math.atanh(high) - math.atanh(0.9) == pytest.approx(stats.t.ppf(0.975, 9) * 0.02 / (1 - 0.81))


def test_fewer_than_ten_patients_is_not_estimable() -> None:
    spread = Spread(0.01, 8)
    assert estimate(0.5, 90, 9, spread).interval == NOT_ESTIMABLE
    assert estimate(0.5, 90, 30, spread, smallest_group=9).interval == NOT_ESTIMABLE
    assert isinstance(estimate(0.5, 90, 10, spread).interval, tuple)
    assert estimate(float("nan"), 3, 30, spread) == Estimate(None, 3, 30, None)


def test_where_all_patients_agree() -> None:
    nothing = Spread(0.0)
    for value in (0.0, 1.0):
        assert estimate(value, 60, 20, nothing, SHARE, 12).interval == wilson(round(12 * value), 12)
    # A difference of nothing is no share.
    found = estimate(0.0, 60, 20, nothing)
    assert (found.interval, found.reason) == (NOT_ESTIMABLE, "all patients agree")


def test_wilson_interval() -> None:
    assert wilson(0, 0) is None
    low, high = wilson(8, 10)  # type: ignore[misc]
    assert low == pytest.approx(0.4902, abs=1e-3)
    assert high == pytest.approx(0.9433, abs=1e-3)


def test_shares_in_percent() -> None:
    found, percent = share_of_samples(3, 12), share_of_samples(3, 12, 100.0)
    assert (found.value, percent.value) == (0.25, 25.0)
    assert percent.interval == pytest.approx(tuple(100 * bound for bound in wilson(3, 12)))  # type: ignore[union-attr]
    assert share_of_samples(0, 0, 100.0).interval is None


def test_a_mean_of_groups_has_the_interval_of_that_mean() -> None:
    assert mean_of_shares([30], [40]).interval == wilson(30, 40)
    # One large group that always hits, one small that never does: the mean is known as well as the small one is.
    found = mean_of_shares([1000, 0], [1000, 10])
    assert (found.value, found.n_patches, found.interval_over) == (0.5, 1010, "samples")
    p, q = 1001 / 1002, 1 / 12
    reach = 1.959964 * math.sqrt(p * (1 - p) / 1002 + q * (1 - q) / 12) / 2
    assert found.interval == pytest.approx(((p + q) / 2 - reach, (p + q) / 2 + reach))
    for hits in ([0, 0], [20, 20]):
        edge = mean_of_shares(hits, [20, 20])
        low, high = edge.interval  # type: ignore[misc]
        assert 0 <= low <= edge.value <= high <= 1  # type: ignore[operator]
        assert 0.05 < high - low < 0.2


def test_groups_with_a_patient_in_common_are_one_sample() -> None:
    present = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], bool)
    assert strata_of(present).tolist() == [0, 0, 0, 1, 1]
    assert strata_of(np.eye(3, dtype=bool)).tolist() == [0, 1, 2]


def test_a_share_of_one_may_be_rounded() -> None:
    """The mean of seven classes of 1.0 is 0.9999999999999998."""
    for value in (1 - 2e-16, 1 + 4e-16):
        found = estimate(value, 70, 14, Spread(1e-32, 6.0), SHARE)
        assert found.value == 1.0
        assert found.interval == wilson(14, 14)
    assert estimate(1.0, 70, 14, Spread(math.inf, 1.0), SHARE).interval == NOT_ESTIMABLE  # its draws are unknown
