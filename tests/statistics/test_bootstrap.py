"""Support, intervals and the patient-first mean."""

from __future__ import annotations

import numpy as np
import pytest

from latent_medi.statistics.bootstrap import PatientResamples, PatientTable, estimate, interval
from latent_medi.statistics.intervals import NOT_ESTIMABLE, Estimate, wilson


def test_balanced_mean_by_hand() -> None:
    # Class 0: patient a 1/2, patient b 1/1 -> 0.75; class 1: patient a 0/1, patient c 1/4 -> 0.125.
    # The last row does not count.
    classes = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0])
    patients = np.array([0, 0, 1, 0, 2, 2, 2, 2, 2])
    right = np.array([1, 0, 1, 0, 1, 0, 0, 0, 0], float)
    keep = np.array([True] * 8 + [False])
    table = PatientTable(classes, patients, keep, 3, 3)
    assert table.mean(right)[0] == pytest.approx((0.75 + 0.125) / 2)
    assert (table.n_patches, table.n_patients) == (8, 3)
    doubled = table.mean(right, np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0]]))
    assert doubled[0] == pytest.approx(((2 * 0.5 + 1) / 3 + 0.0) / 2)
    assert np.isnan(doubled[1])  # class 1 lost


def test_fewer_than_ten_patients_is_not_estimable() -> None:
    draws = np.random.default_rng(0).normal(0.5, 0.1, 500)
    assert estimate(0.5, 90, 9, draws).interval == NOT_ESTIMABLE
    low, high = estimate(0.5, 90, 10, draws).interval
    assert low == pytest.approx(0.5 - 1.96 * 0.1, abs=0.03)
    assert high == pytest.approx(0.5 + 1.96 * 0.1, abs=0.03)
    assert estimate(float("nan"), 3, 30, draws) == Estimate(None, 3, 30, None)


def test_recentred_interval_removes_the_bias_of_resampling() -> None:
    draws = np.random.default_rng(0).normal(2.0, 0.1, 500)
    low, high = interval(draws, centre=1.0)  # type: ignore[misc]
    assert low < 1.0 < high
    assert interval(draws - 1.95, centre=0.05, lowest=0.0)[0] == 0.0  # type: ignore[index]
    assert interval(np.full(500, np.nan)) is None


def test_resamples_draw_whole_patients() -> None:
    patients = np.array(["b", "a", "b", "c"])
    resamples = PatientResamples(patients, 50, 0)
    weights = resamples.row_weights(np.arange(4))
    assert weights.shape == (50, 4)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 2])
    np.testing.assert_array_equal(resamples.weights.sum(axis=1), 3)


def test_wilson_interval() -> None:
    assert wilson(0, 0) is None
    low, high = wilson(8, 10)  # type: ignore[misc]
    assert low == pytest.approx(0.4902, abs=1e-3)
    assert high == pytest.approx(0.9433, abs=1e-3)


def test_a_mean_over_classes_is_as_sure_as_its_smallest_class() -> None:
    """A class of one patient is in every resample that counts: it would make the interval narrower, not wider."""
    for few, known in ((9, False), (10, True)):
        classes = np.repeat([0, 1], [30, few])
        patients = np.arange(30 + few)
        table = PatientTable(classes, patients, np.full(30 + few, True), 2, 30 + few)
        right = np.random.default_rng(0).integers(0, 2, 30 + few).astype(float)
        record = table.estimate(right, PatientResamples(patients.astype(str), 200, 0).weights)
        assert record.smallest_group == few
        assert record.n_patients == 30 + few
        assert isinstance(record.interval, tuple) is known


def test_a_share_that_all_patients_agree_on_is_not_certain() -> None:
    """Every resample of twelve patients who are all right is all right: that is no interval of no width."""
    patients = np.arange(12)
    table = PatientTable(np.zeros(12, int), patients, np.full(12, True), 1, 12)
    weights = PatientResamples(patients.astype(str), 200, 0).weights
    for value in (0.0, 1.0):
        record = table.estimate(np.full(12, value), weights, rate=True)
        assert record.interval == pytest.approx(wilson(round(12 * value), 12))
    # A difference of nothing is no share.
    assert table.estimate(np.zeros(12), weights).interval == (0.0, 0.0)


def test_no_bound_lies_where_the_quantity_cannot() -> None:
    draws = np.random.default_rng(0).normal(0.9, 0.1, 400)
    record = estimate(0.98, 100, 30, draws, recentre=True, lowest=0.0, highest=1.0)
    assert record.interval[1] == 1.0
    assert record.interval[0] < 0.9
    assert estimate(0.01, 100, 30, draws - 0.8, lowest=0.0).interval[0] == 0.0


def test_resamples_that_are_mostly_lost_give_no_interval() -> None:
    draws = np.random.default_rng(0).normal(0.5, 0.1, 200)
    assert interval(np.where(np.arange(200) < 150, draws, np.nan)) is None
    assert interval(np.where(np.arange(200) < 170, draws, np.nan)) is not None
