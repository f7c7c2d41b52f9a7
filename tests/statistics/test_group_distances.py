"""Distances of samples on the scale of real patches equal sums over pairs, and noise is beyond it."""

from __future__ import annotations

import numpy as np
import pytest

from latent_medi.statistics.group_distances import distance_in_groups
from latent_medi.statistics.kernel_distance import kid


def _mean(a: np.ndarray, b: np.ndarray, keep: np.ndarray) -> float:
    return float(np.mean([(a[i] @ b[j] / a.shape[1] + 1) ** 3 for i, j in np.argwhere(keep)]))


def _pairs(x: np.ndarray, who: np.ndarray, y: np.ndarray, whose: np.ndarray) -> float:
    return _mean(x, y, who[:, None] != whose[None, :])


def test_equals_sums_over_pairs_of_different_patients() -> None:
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(15), 5)
    groups = np.array(["a", "b", "c"])[patients % 3]
    groups[:2] = "b"  # a patient in two groups
    real = rng.normal(size=(75, 4)) + (groups == "c")[:, None] * 0.8 + rng.normal(size=(15, 4))[patients]
    samples = rng.normal(size=(12, 4))
    found = distance_in_groups(samples, real, groups, patients)
    assert found.value == pytest.approx(kid(real, samples, patients))
    expected = []
    for name in "abc":
        own, rest = groups == name, groups != name
        expected.append(
            _pairs(real[own], patients[own], real[own], patients[own])
            + _pairs(real[rest], patients[rest], real[rest], patients[rest])
            - 2 * _pairs(real[own], patients[own], real[rest], patients[rest])
        )
    assert found.farthest == pytest.approx(max(expected))
    each = []
    for patient in range(15):
        own, rest = real[patients == patient], patients != patient
        each.append(
            _mean(own, own, ~np.eye(5, dtype=bool))
            + _pairs(real[rest], patients[rest], real[rest], patients[rest])
            - 2 * _mean(own, real[rest], np.ones((5, 70), bool))
        )
    assert found.patients == pytest.approx(np.median(each))
    assert found.ratio == pytest.approx(found.value / max(found.farthest, found.patients))


def test_what_cannot_be_compared_is_unknown() -> None:
    rng = np.random.default_rng(1)
    real, samples = rng.normal(size=(40, 3)), rng.normal(size=(20, 3))
    alone = distance_in_groups(samples, real, np.zeros(40, int), np.arange(40))
    assert (alone.farthest, alone.patients, alone.ratio) == (None, None, None)
    one_group = distance_in_groups(samples, real, np.zeros(40, int), np.arange(40) // 4)
    assert one_group.farthest is None
    assert one_group.patients is not None
    small = distance_in_groups(samples, real, np.arange(40) // 9, np.arange(40) // 2)  # 9 rows each
    assert small.farthest is None


def test_other_patients_are_near_and_what_is_elsewhere_is_far() -> None:
    rng = np.random.default_rng(2)
    centres = 1.5 * rng.normal(size=(6, 8))

    def tissue(n_patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        patients = np.repeat(np.arange(n_patients), 4)
        groups = patients % 6
        effects = 0.5 * rng.normal(size=(n_patients, 8))
        return centres[groups] + effects[patients] + 0.5 * rng.normal(size=(len(patients), 8)), groups, patients

    real, groups, patients = tissue(60)
    others, kinds, _ = tissue(60)
    assert abs(distance_in_groups(others, real, groups, patients).ratio or 0) < 0.2
    for kind in range(6):  # all samples of one combination: like the combinations of the real patches
        assert 0 < (distance_in_groups(others[kinds == kind], real, groups, patients).ratio or 0) < 1.2
    noise = 5.0 + 2.0 * rng.normal(size=(200, 8))
    assert (distance_in_groups(noise, real, groups, patients).ratio or 0) > 2
