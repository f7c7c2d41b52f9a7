"""Kernel distances of patients: which pairs count, what is left without a patient, and how sure the value is."""

from __future__ import annotations

import numpy as np
import pytest

from latent_medi.statistics.intervals import jackknife
from latent_medi.statistics.kernel_distance import (
    KernelDistance,
    KernelSet,
    LeftOut,
    distance_ratio,
    kernel_distance,
    kid,
    mean_distance,
)

Side = tuple[np.ndarray, np.ndarray, np.ndarray]


def _k(x: np.ndarray, y: np.ndarray) -> float:
    return float((x @ y / len(x) + 1) ** 3)


def _within(side: Side, share: dict[int, float]) -> float:
    """Mean over pairs of different patients for each pair of strata, weighed by shares, pair by pair."""
    x, who, kind = side
    total = 0.0
    for s, a in share.items():
        for t, b in share.items():
            found = [
                _k(x[i], x[j]) for i in np.flatnonzero(kind == s) for j in np.flatnonzero(kind == t) if who[i] != who[j]
            ]
            total += a * b * float(np.mean(found))
    return total


def _cross(a: Side, b: Side, share_a: dict[int, float], share_b: dict[int, float]) -> float:
    return sum(
        p * q * float(np.mean([[_k(x, y) for y in b[0][b[2] == t]] for x in a[0][a[2] == s]]))
        for s, p in share_a.items()
        for t, q in share_b.items()
    )


def _brute(a: Side, b: Side, share_a: dict[int, float], share_b: dict[int, float]) -> float:
    return _within(a, share_a) + _within(b, share_b) - 2 * _cross(a, b, share_a, share_b)


def _shares(kind: np.ndarray) -> dict[int, float]:
    return {int(s): float((kind == s).mean()) for s in np.unique(kind)}


def _without(side: Side, person: int) -> Side:
    keep = side[1] != person
    return side[0][keep], side[1][keep], side[2][keep]


def _side(seed: int, strata: int, crossing: bool) -> Side:
    """Strata of three and four patients of one to three patches; with ``crossing`` some have patches of two strata."""
    rng = np.random.default_rng(seed)
    who, kind = [], []
    for s in range(strata):
        for p in range(3 + s % 2):
            for _ in range(rng.integers(1, 4)):
                who.append(10 * s + p)
                kind.append(s)
    if crossing:
        for p in (0, 1):
            who.append(p)
            kind.append(1)
    return rng.normal(size=(len(who), 3)) + 0.3 * np.array(kind)[:, None], np.array(who), np.array(kind)


@pytest.mark.parametrize("design", [(1, False), (2, False), (3, True)])
def test_it_is_the_mean_over_pairs_of_different_patients_with_and_without_each(
    design: tuple[int, bool],
) -> None:
    a, b = _side(0, *design), _side(1, 1, False)
    found = kernel_distance(KernelSet(*a), KernelSet(*b))
    shares = _shares(a[2]), _shares(b[2])
    assert found.value == pytest.approx(_brute(a, b, *shares), rel=1e-9)
    assert list(found.reference.units) == sorted(set(a[1]))
    for person, value in zip(found.reference.units, found.reference.values, strict=True):
        assert value == pytest.approx(_brute(_without(a, person), b, *shares), rel=1e-9)
    for person, value in zip(found.sample.units, found.sample.values, strict=True):
        assert value == pytest.approx(_brute(a, _without(b, person), *shares), rel=1e-9)


def test_each_its_own_patient_is_the_usual_distance() -> None:
    theirs = pytest.importorskip("torch_fidelity.metric_kid")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 6)), rng.normal(size=(40, 6)) + 0.4
    assert kid(a, b) == pytest.approx(kid(a, b, np.arange(40), np.arange(40)), rel=1e-12)
    kernels = [theirs.kernel_poly(x, y, kid_kernel_poly_gamma=None) for x, y in ((a, a), (a, b), (b, b))]
    assert kid(a, b) == pytest.approx(theirs.mmd2(*kernels), rel=1e-9)


def test_real_patches_of_other_patients_are_at_no_distance() -> None:
    """With pairs of one patient, patches look nearer to their own set than they are."""
    rng = np.random.default_rng(0)
    who = np.repeat(np.arange(12), 5)

    def patches() -> np.ndarray:
        return 0.7 * rng.normal(size=(12, 8))[who] + 0.7 * rng.normal(size=(60, 8))

    pairs = [(patches(), patches()) for _ in range(400)]
    apart = np.array([kid(a, b, who, who) for a, b in pairs])
    assert abs(apart.mean()) < 3 * apart.std() / 20
    plain = np.array([kid(a, b) for a, b in pairs])
    assert plain.mean() > 10 * apart.std() / 20


def test_strata_in_equal_shares_are_at_no_distance() -> None:
    """Hospitals that differ, three patients each: pairs of one hospital keep their share."""
    rng = np.random.default_rng(0)
    site, who = np.repeat([0, 1, 2], 6), np.repeat(np.arange(9), 2)
    centre = 2.0 * np.eye(3, 4)

    def patches() -> np.ndarray:
        return centre[site] + 0.3 * rng.normal(size=(9, 4))[who] + 0.3 * rng.normal(size=(18, 4))

    def mean(strata: np.ndarray | None) -> tuple[float, float]:
        found = [kernel_distance(*(KernelSet(patches(), who, strata) for _ in range(2))).value for _ in range(300)]
        return float(np.mean(found)), float(np.std(found)) / np.sqrt(300)

    value, error = mean(site)
    assert abs(value) < 3 * error
    value, error = mean(None)
    assert value < -10 * error


def test_strata_of_few_patients_are_joined() -> None:
    rng = np.random.default_rng(0)
    x, who = rng.normal(size=(10, 3)), np.arange(10)
    few = np.array([0, 0, 0, 0, 1, 1, 2, 3, 3, 3])
    joined = np.array([0, 0, 0, 0, 1, 1, 1, 3, 3, 3])
    assert KernelSet(x, who, few).within == pytest.approx(KernelSet(x, who, joined).within)
    lonely, with_largest = np.where(few == 2, 0, few), np.where(few == 3, 0, np.where(few == 2, 1, few))
    lonely[lonely == 1] = 9
    assert len(set(KernelSet(x, who, lonely).strata)) == 2  # the two of one stratum went to the largest
    assert KernelSet(x, who, with_largest).within == pytest.approx(KernelSet(x, who, with_largest).within)
    with pytest.raises(ValueError, match="two patients"):
        KernelSet(x, np.zeros(10))


def test_a_mean_moves_by_each_of_its_distances() -> None:
    """The patients of two combinations: leaving one out changes what that patient is in."""
    parts = [(np.array(["a", "b", "c"]), [1.0, 2.0, 3.0]), (np.array(["c", "d"]), [10.0, 20.0])]
    sample = LeftOut(np.array([0, 1]), np.array([0.0, 0.0]), np.zeros(2, int))
    found = mean_distance(
        [
            KernelDistance(value, LeftOut(units, np.array(values), np.zeros(len(units), int)), sample)
            for (units, values), value in zip(parts, (2.0, 12.0), strict=True)
        ]
    )
    assert found.value == 7.0
    assert list(found.reference.units) == ["a", "b", "c", "d"]
    assert list(found.reference.values) == [6.5, 7.0, 7.0 + 0.5 - 1.0, 7.0 + 4.0]
    assert len(set(found.reference.strata)) == 1  # c is in both, so their patients are one sample
    of_others = [LeftOut(np.array(units), np.zeros(2), np.zeros(2, int)) for units in (["a", "b"], ["c", "d"])]
    apart = mean_distance([KernelDistance(1.0, others, sample) for others in of_others])
    assert apart.reference.strata.tolist() == [0, 0, 1, 1]


def test_a_ratio_is_as_unsure_as_what_it_divides() -> None:
    units = np.arange(30)
    rng = np.random.default_rng(0)

    def distance(value: float, own: float) -> KernelDistance:
        common = LeftOut(units, value * (1 + 0.01 * np.sin(units)), np.zeros(30, int))
        return KernelDistance(value, common, LeftOut(units, value + own * rng.normal(size=30), np.zeros(30, int)))

    a, b = distance(2.0, 0.01), distance(8.0, 0.02)
    found = distance_ratio(a, b)
    assert found is not None
    value, spread = found
    assert value == pytest.approx(0.25, abs=0.01)
    # What both distances have in common cancels, patient by patient.
    own = jackknife(a.sample.values).variance / 64 + jackknife(b.sample.values).variance * (2 / 64) ** 2
    assert spread.variance == pytest.approx(own, rel=0.01)
    assert distance_ratio(a, distance(0.02, 0.02)) is None
    assert distance_ratio(a, distance(-1.0, 0.02)) is None


def test_a_ratio_is_less_the_bias_that_dividing_brings() -> None:
    """Quenouille's: (m − 1)·(mean without each unit − value). Dividing by what varies makes a ratio too large."""
    own = LeftOut(np.arange(20), np.full(20, 1.0), np.zeros(20, int))
    varying = LeftOut(np.arange(20), 2 + 0.05 * (-1.0) ** np.arange(20), np.zeros(20, int))
    candidate = KernelDistance(1.0, own, own)
    baseline = KernelDistance(2.0, LeftOut(own.units, np.full(20, 2.0), own.strata), varying)
    found = distance_ratio(candidate, baseline)
    assert found is not None
    mean = (1 / 2.05 + 1 / 1.95) / 2
    assert found[0] == pytest.approx(0.5 - 19 * (mean - 0.5), abs=1e-12)
    assert found[0] < 0.5 - 0.005
