"""The choice of a variant knows nothing of the patients that it is judged by."""

from __future__ import annotations

import numpy as np

from latent_medi.statistics.cross_fitting import cross_fitted, patient_folds

PATIENTS = np.repeat(np.arange(30), 3)
STRATA = np.repeat(np.array(["a", "b", "c"])[np.arange(30) % 3], 3)


def test_folds_keep_patients_whole_and_strata_even() -> None:
    folds = patient_folds(PATIENTS, STRATA, 0)
    assert set(folds) == set(range(5))
    for patient in range(30):
        assert len(set(folds[patient == PATIENTS])) == 1
    for stratum in "abc":
        assert np.bincount(folds[stratum == STRATA]).tolist() == [6] * 5
    assert np.array_equal(folds, patient_folds(PATIENTS, STRATA, 0))
    assert not np.array_equal(folds, patient_folds(PATIENTS, STRATA, 1))
    assert set(patient_folds(PATIENTS[:9], STRATA[:9], 0)) == {0, 1, 2}


def chosen(right: dict[str, np.ndarray], folds: np.ndarray) -> dict[str, np.ndarray]:
    variants = {name: values[None] for name, values in right.items()}
    return cross_fitted(variants, folds, lambda values, keep: float(values[:, keep].mean()))


def test_the_best_variant_of_the_other_folds_judges() -> None:
    folds = np.arange(40) // 8
    first, second = np.zeros(40), np.full(40, 0.5)
    first[:8] = 9.0  # only one fold makes the first better: it decides for all but itself
    masks = chosen({"first": first, "second": second}, folds)
    assert masks["second"].tolist() == (folds == 0).tolist()
    assert masks["first"].tolist() == (folds != 0).tolist()
    alone = chosen({"first": first, "second": second}, np.zeros(40, int))
    assert alone["first"].all()


def test_a_patient_does_not_change_his_own_variant() -> None:
    rng = np.random.default_rng(0)
    folds = patient_folds(PATIENTS, STRATA, 0)
    right = {"first": rng.random(90), "second": rng.random(90)}
    before = chosen(right, folds)
    for fold in range(5):
        own = folds == fold
        after = chosen({"first": np.where(own, 1e6, right["first"]), "second": right["second"]}, folds)
        assert np.array_equal(after["first"][own], before["first"][own])


def test_chance_gains_nothing_by_the_choice() -> None:
    """Of equal variants the better on the same patients looks better than it is; the cross-fitted one does not."""
    rng = np.random.default_rng(3)
    folds = np.arange(20) % 5
    gains, best = [], []
    for _ in range(2000):
        right = {"first": rng.normal(size=20), "second": rng.normal(size=20)}
        masks = chosen(right, folds)
        gains.append(np.where(masks["first"], right["first"], right["second"]).mean())
        best.append(max(values.mean() for values in right.values()))
    assert abs(np.mean(gains)) < 0.03
    assert np.mean(best) > 0.08
