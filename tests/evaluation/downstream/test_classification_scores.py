"""Scores of probabilities: by hand, against scikit-learn and torchmetrics, and without each patient in turn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_world import CLASSES, World
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, matthews_corrcoef, roc_auc_score
from torchmetrics.functional.classification import multiclass_calibration_error

from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream import classification_scores
from latent_medi.evaluation.downstream.classification_scores import Units
from latent_medi.evaluation.downstream.records import SmallGroup
from latent_medi.evaluation.results import Metrics
from latent_medi.statistics import left_out
from latent_medi.statistics.intervals import Estimate, Spread, estimate, wilson


def _case(seed: int, n: int = 200, k: int = 3, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, k, n)
    odds = rng.gamma(1.0, size=(n, k)) + 0.7 * np.eye(k)[truth]
    probabilities = np.round(odds / odds.sum(axis=1, keepdims=True), digits)  # few digits make ties
    return truth, probabilities / probabilities.sum(axis=1, keepdims=True)


def _scores(
    truth: np.ndarray, probabilities: np.ndarray, sites: np.ndarray, patients: np.ndarray
) -> dict[str, Estimate]:
    codes = np.unique(patients, return_inverse=True)[1]
    names = [f"c{i}" for i in range(probabilities.shape[1])]
    units = Units(truth, sites, codes, np.ones(len(truth), int))
    found = vars(classification_scores.unit_scores(probabilities, units, names))
    assert found.pop("n_units") == len(truth)
    return found


@pytest.mark.parametrize("k", [2, 3, 5])
def test_points_are_those_of_known_libraries(k: int) -> None:
    truth, probabilities = _case(k, k=k, digits=12)  # none at the edge of a bin
    sites = np.array(["s", "t"])[np.arange(200) % 2]
    found = {n: e.value for n, e in _scores(truth, probabilities, sites, np.arange(200) // 4).items()}
    predicted = probabilities.argmax(axis=1)
    by_site = [balanced_accuracy_score(truth[sites == s], predicted[sites == s]) for s in ("s", "t")]
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert found["site_averaged_accuracy"] == pytest.approx(np.mean(by_site))
    assert found["mcc"] == pytest.approx(matthews_corrcoef(truth, predicted))
    area = roc_auc_score(truth, probabilities if k > 2 else probabilities[:, 1], multi_class="ovo")
    assert found["auroc"] == pytest.approx(area)
    error = multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(truth), k, n_bins=classification_scores.BINS
    )
    assert found["ece"] == pytest.approx(float(error), abs=1e-6)
    brier = brier_score_loss(truth, probabilities, labels=range(k), scale_by_half=False)
    assert found["brier"] == pytest.approx(brier)


def _uneven_patients(n: int, seed: int) -> np.ndarray:
    """Patients of one to many rows, all of whom have a row."""
    codes = np.sort(np.random.default_rng(seed).integers(0, n // 6, n))
    return np.random.default_rng(seed).permutation(np.unique(codes, return_inverse=True)[1])


@pytest.mark.parametrize("k", [2, 4])
def test_a_score_without_a_patient_is_that_of_the_other_rows(k: int) -> None:
    """Patients have several classes and sites, and scores are tied."""
    truth, probabilities = _case(7, 150, k, digits=1)
    predicted, patients = probabilities.argmax(axis=1), _uneven_patients(150, 1)
    sites = np.random.default_rng(2).integers(0, 2, 150)
    cells, weights = classification_scores._groups(truth, sites)[1:]
    everything = np.arange(150)

    def areas(rows: np.ndarray) -> float:
        scores = probabilities[rows] if k > 2 else probabilities[rows, 1]
        return float(roc_auc_score(truth[rows], scores, multi_class="ovo", labels=range(k)))

    def calibration(rows: np.ndarray) -> float:
        rows_of_one = np.zeros(len(rows), int)
        return left_out.calibration_error(probabilities[rows], truth[rows], rows_of_one, 15).value

    pairs: list[tuple[left_out.Score, Any]] = [
        (
            left_out.mean_of_groups((predicted == truth).astype(float), truth, np.full(k, 1 / k), patients),
            lambda r: balanced_accuracy_score(truth[r], predicted[r]),
        ),
        (
            left_out.mean_of_groups((predicted == truth).astype(float), cells, weights, patients),
            lambda r: classification_scores.site_averaged(truth[r], predicted[r], sites[r]),
        ),
        (left_out.correlation(truth, predicted, k, patients), lambda r: matthews_corrcoef(truth[r], predicted[r])),
        (left_out.pairwise_auroc(truth, probabilities, patients), areas),
        (left_out.calibration_error(probabilities, truth, patients, 15), calibration),
        (left_out.mean(probabilities[:, 0], patients), lambda r: probabilities[r, 0].mean()),
    ]
    for found, point in pairs:
        assert found.value == pytest.approx(point(everything))
        assert len(found.left_out) == patients.max() + 1
        for patient, value in enumerate(found.left_out):
            assert value == pytest.approx(point(np.flatnonzero(patients != patient)))


def test_a_score_that_cannot_do_without_a_patient() -> None:
    """The only patient of a class: what is left has no such class, which is another score."""
    truth, patients = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 2])
    found = left_out.mean_of_groups(np.ones(4), truth, np.array([0.5, 0.5]), patients)
    np.testing.assert_array_equal(found.left_out, [1, 1, np.nan])
    area = left_out.pairwise_auroc(truth, np.eye(2)[truth], patients)
    np.testing.assert_array_equal(area.left_out, [1, 1, np.nan])


def test_scores_survive_a_missing_class_and_no_rows() -> None:
    truth, probabilities = _case(3)
    keep = truth != 1
    found = _scores(truth[keep], probabilities[keep], np.full(keep.sum(), "s"), np.arange(keep.sum()) // 2)
    one = truth[keep] == 2
    wanted = np.mean([roc_auc_score(one, probabilities[keep, 2]), roc_auc_score(~one, probabilities[keep, 0])])
    assert found["auroc"].value == pytest.approx(wanted)
    assert isinstance(found["mcc"].interval, tuple)
    alone = _scores(
        truth[truth == 0], probabilities[truth == 0], np.full((truth == 0).sum(), "s"), np.arange((truth == 0).sum())
    )
    assert alone["auroc"].value is None
    nothing = _scores(truth[:0], probabilities[:0], np.zeros(0, str), np.zeros(0, int))
    assert all(e.value is None for e in nothing.values())


def test_patients_who_all_agree_leave_no_interval_of_no_width() -> None:
    truth = np.repeat([0, 1], 20)
    found = _scores(truth, np.eye(2)[truth], np.full(40, "s"), np.arange(40))
    for name in ("balanced_accuracy", "site_averaged_accuracy"):
        assert found[name].interval == pytest.approx(wilson(20, 20))
    assert found["worst_group"].interval == pytest.approx(wilson(20, 20, 0.975))  # the lower of two
    for name in ("mcc", "auroc", "brier", "ece"):
        assert found[name].interval == "not estimable"


def test_scores_that_weigh_classes_alike_are_as_sure_as_the_smallest() -> None:
    truth = np.repeat([0, 1, 2], [40, 40, 9])
    probabilities = np.random.default_rng(0).dirichlet(np.ones(3), 89)
    found = _scores(truth, probabilities, np.full(89, "s"), np.arange(89))
    for name in ("balanced_accuracy", "site_averaged_accuracy", "auroc"):
        assert found[name].interval == "not estimable"
        assert found[name].smallest_group == 9
    for name in ("mcc", "brier", "ece"):
        assert isinstance(found[name].interval, tuple)


def test_worst_group_needs_ten_patients() -> None:
    # Group a × s: 10 patients, half right. a × t: 12 patients, 3 of 4 right. b × s: 9 patients, none right.
    rows = [(0, "s", f"p{i}", i % 2 == 0) for i in range(10)]
    rows += [(0, "t", f"q{i}", i % 4 != 0) for i in range(12)]
    rows += [(1, "s", f"r{i}", False) for i in range(9)]
    rows += [(0, "s", "p0", False)] * 3  # patient p0: 1 of 4, which is averaged over patients first
    truth = np.array([r[0] for r in rows])
    right = np.array([r[3] for r in rows])
    patients = np.unique([r[2] for r in rows], return_inverse=True)[1]
    found = classification_scores.worst_group(
        np.where(right, truth, 1 - truth),
        Units(truth, np.array([r[1] for r in rows]), patients, np.ones(len(rows), int)),
        ["a", "b"],
    )
    assert found.group == "a × s"
    assert found.value == pytest.approx((0.25 + 4) / 10)
    assert found.n_groups == 2
    assert (found.n_patients, found.n_patches) == (10, 13)
    assert found.not_estimable == [SmallGroup("b × s", 9)]
    # The lowest of two: each interval has 97.5 %, so that both hold together with 95 %.
    means = np.array([0.25, 0, 1, 0, 1, 0, 1, 0, 1, 0])
    spread = Spread(means.var(ddof=1) / 10, 9)
    assert found.interval == estimate(0.425, 13, 10, spread, (0.0, 1.0), level=0.975).interval


def test_slides_and_patients_by_hand() -> None:
    index = pd.DataFrame(
        [("a", "s", "1", "x"), ("a", "s", "1", "x"), ("a", "s", "1", "y"), ("b", "s", "1", "y"), ("b", "t", "2", "x")],
        columns=["class", "site", "patient", "slide"],
    )
    study = cast(
        Study,
        SimpleNamespace(index=index, site_labels=index["site"].to_numpy(str), test=np.arange(5), classes=["a", "b"]),
    )
    patients = np.array([0, 0, 0, 0, 1])
    codes = np.array([0, 0, 0, 1, 1])
    scorer = classification_scores.UnitScorer(study, codes, np.array([False] * 4 + [True]), patients)
    probabilities = np.array([[0.9, 0.1], [0.3, 0.7], [0.0, 1.0], [0.2, 0.8], [0.6, 0.4]])
    slide, patient = scorer.groupings["slide"], scorer.groupings["patient"]
    # Patient 1: slide x has class a twice, slide y one patch of each class; patient 2's slide x is another slide.
    by_slide = {
        (int(p), int(c), round(float(m), 6))
        for p, c, m in zip(slide.units.patients, slide.units.truth, slide.mean(probabilities)[:, 0], strict=True)
    }
    assert by_slide == {(0, 0, 0.6), (0, 0, 0.0), (0, 1, 0.2), (1, 1, 0.6)}
    by_patient = {
        (int(p), int(c), round(float(m), 6))
        for p, c, m in zip(patient.units.patients, patient.units.truth, patient.mean(probabilities)[:, 0], strict=True)
    }
    assert by_patient == {(0, 0, 0.4), (0, 1, 0.2), (1, 1, 0.6)}
    record = scorer.score(probabilities)
    # Patients: class a is missed (0.4), class b found once of twice.
    assert record.patient.all.balanced_accuracy.value == pytest.approx(0.25)
    assert record.patient.all.n_units == 3
    assert record.patient.all.balanced_accuracy.n_patches == 5
    assert record.patient.shift.n_units == 1
    assert record.slide.all.balanced_accuracy.value == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_saved_probabilities_give_the_recorded_scores(world: World, results: Metrics) -> None:
    table = pd.read_csv(world.root / "full" / "predictions.csv", dtype={"patient": str})
    table = table[table["encoder"] == "filters"]
    truth = table["class"].map({c: i for i, c in enumerate(CLASSES)}).to_numpy()
    for name, result in results.downstream["filters"].training_sets.items():
        found = table[[f"probability_{name}_{c}" for c in CLASSES]].to_numpy()
        assert np.allclose(found.sum(axis=1), 1.0, atol=1e-5)
        recorded = result.scores.patch.all
        assert recorded.mcc.value == pytest.approx(matthews_corrcoef(truth, found.argmax(axis=1)), abs=2e-3)
        assert recorded.worst_group.group
