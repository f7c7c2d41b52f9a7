"""The patient-first mean, and its values without each patient."""

from __future__ import annotations

import numpy as np
import pytest

from latent_medi.statistics.intervals import wilson
from latent_medi.statistics.patient_means import PatientTable


def test_balanced_mean_by_hand() -> None:
    # Class 0: patient a 1/2, patient b 1/1 -> 0.75; class 1: patient a 0/1, patient c 1/4 -> 0.125.
    # The last row does not count.
    classes = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0])
    patients = np.array([0, 0, 1, 0, 2, 2, 2, 2, 2])
    right = np.array([1, 0, 1, 0, 1, 0, 0, 0, 0], float)
    keep = np.array([True] * 8 + [False])
    table = PatientTable(classes, patients, keep, 3, 3)
    assert table.mean(right) == pytest.approx((0.75 + 0.125) / 2)
    assert (table.n_patches, table.n_patients, table.smallest_class) == (8, 3, 2)
    # Without a: 1/1 and 1/4; without b: 1/2 and 0.125; without c: 0.75 and 0.
    assert table.left_out(right) == pytest.approx([0.625, 0.3125, 0.375])
    # Patient a is in both classes: without a both means change, so all are one sample.
    assert len(set(table.strata)) == 1


def test_patients_of_several_classes_are_not_split_into_small_samples() -> None:
    """The variance is that of the mean's influence on patients, whichever classes each has."""
    rng = np.random.default_rng(0)
    classes, patients = np.nonzero(rng.random((3, 200)) < 0.5)
    values = rng.random(200)[patients]
    table = PatientTable(classes, patients, np.full(len(classes), True), 3, 200)
    influence = np.zeros(200)
    for code in range(3):
        own = classes == code
        influence[patients[own]] += (values[own] - values[own].mean()) / own.sum() / 3
    assert table.spread(values).variance == pytest.approx((influence**2).sum(), rel=0.03)


def test_the_only_patient_of_a_class() -> None:
    table = PatientTable(np.array([0, 0, 1]), np.array([0, 1, 2]), np.full(3, True), 2, 3)
    np.testing.assert_array_equal(table.left_out(np.ones(3)), [1, 1, np.nan])


def test_no_row_counts() -> None:
    table = PatientTable(np.zeros(3, int), np.arange(3), np.full(3, False), 1, 3)
    found = table.estimate(np.ones(3), share=True)
    assert (found.value, found.interval, found.n_patients) == (None, None, 0)


def test_a_mean_over_classes_is_as_sure_as_its_smallest_class() -> None:
    for few, known in ((9, False), (10, True)):
        classes = np.repeat([0, 1], [30, few])
        table = PatientTable(classes, np.arange(30 + few), np.full(30 + few, True), 2, 30 + few)
        record = table.estimate(np.random.default_rng(0).integers(0, 2, 30 + few).astype(float))
        assert record.smallest_group == few
        assert record.n_patients == 30 + few
        assert isinstance(record.interval, tuple) is known


def test_a_share_that_all_patients_agree_on_is_not_certain() -> None:
    table = PatientTable.of_one_group(np.arange(12).astype(str), np.full(12, True))
    for value in (0.0, 1.0):
        record = table.estimate(np.full(12, value), share=True)
        assert record.interval == pytest.approx(wilson(round(12 * value), 12))
