"""Scores of confusion tables: by hand, like scikit-learn's, and without each patient as if it were not there."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from latent_medi.statistics.confusion import RATES, class_rates, confusion_scores, confusion_table, macro_scores


def test_macro_scores_by_hand() -> None:
    truth = np.array(["a", "a", "a", "b", "b", "c"])
    found = np.array(["a", "a", "b", "b", "c", "c"])
    accuracy, f1, sensitivity, specificity = macro_scores(truth, found)
    assert accuracy == pytest.approx(4 / 6)
    assert sensitivity == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert specificity == pytest.approx((3 / 3 + 3 / 4 + 4 / 5) / 3)
    assert f1 == pytest.approx(np.mean([2 * 1 * (2 / 3) / (1 + 2 / 3), 0.5, 2 * 0.5 / 1.5]))


def test_rates_equal_scikit_learns_and_left_out_values_those_of_the_other_rows() -> None:
    rng = np.random.default_rng(0)
    truth, found, patients = rng.integers(0, 4, 200), rng.integers(0, 5, 200), rng.integers(0, 9, 200)
    scores = confusion_scores(truth, found, 5, patients)
    peers = {"sensitivity": recall_score, "precision": precision_score, "f1": f1_score}
    for name, peer in peers.items():
        each = peer(truth, found, labels=range(4), average=None, zero_division=0)
        assert [score.value for score in scores.classes[name][:4]] == pytest.approx(each.tolist())
        assert np.isnan(scores.classes[name][4].value)  # not in the truth
        assert scores.macro[name].value == pytest.approx(each.mean())
    assert scores.accuracy.value == pytest.approx(accuracy_score(truth, found))
    for patient in range(9):
        rest = patients != patient
        accuracy, *macro = macro_scores(truth[rest], found[rest])
        assert scores.accuracy.left_out[patient] == pytest.approx(accuracy)
        left_out = [scores.macro[name].left_out[patient] for name in ("f1", "sensitivity", "specificity")]
        assert left_out == pytest.approx(macro)
        again = confusion_scores(truth[rest], found[rest], 5, np.unique(patients[rest], return_inverse=True)[1])
        for name in RATES:
            ours = [score.left_out[patient] for score in scores.classes[name]]
            np.testing.assert_allclose(ours, [score.value for score in again.classes[name]])


def test_without_the_only_patient_of_a_class_there_is_no_macro_score() -> None:
    truth, found = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    patients = np.array([0, 0, 1, 2, 2])
    scores = confusion_scores(truth, found, 2, patients)
    assert np.isnan(scores.macro["f1"].left_out[0])
    assert np.isfinite(scores.macro["f1"].left_out[1:]).all()
    rates = class_rates(confusion_table(truth, found, 2))
    assert rates.specificity.tolist() == pytest.approx([2 / 3, 1 / 2])
