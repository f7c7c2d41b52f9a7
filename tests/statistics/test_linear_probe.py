"""The probe's protocol: where its C comes from, that it converges, and what fine-tuning means for it."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from evaluation_world import World, filters
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.downstream.classifiers import linear_probe_classifier
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.statistics import linear_probe
from latent_medi.statistics.linear_probe import (
    choose_regularisation,
    fine_tune_linear_probe,
    fit_linear_probe,
    fit_validated_linear_probe,
)


def _blobs(n: int, k: int, seed: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    centres = np.random.default_rng(99).normal(size=(k, 6))
    return centres[labels] + shift + rng.normal(size=(n, 6)), np.array([f"c{v}" for v in labels])


@pytest.mark.parametrize("k", [2, 3])
def test_fine_tuning_from_nothing_is_fitting(k: int) -> None:
    x, y = _blobs(300, k, 0)
    plain = fit_linear_probe(x, y, 0.3)
    same = fine_tune_linear_probe((np.zeros((0, 6)), np.zeros(0, str)), x, y, 0.3)
    assert np.array_equal(same.weights, plain.weights)
    # Pulled towards weights that say nothing, it is fitting too.
    far = _blobs(400, k, 1)[0]
    nothing = fine_tune_linear_probe((far, np.resize(np.unique(y), 400)), x, y, 0.3)
    assert nothing.weights == pytest.approx(plain.weights, abs=0.3)
    assert (nothing.predict(x) == plain.predict(x)).mean() > 0.95


@pytest.mark.parametrize("k", [2, 3])
def test_fine_tuning_is_pulled_to_what_was_learnt_first(k: int) -> None:
    first, (x, y) = _blobs(400, k, 1, 0.5), _blobs(60, k, 2)
    loose, plain = fine_tune_linear_probe(first, x, y, 1.0), fit_linear_probe(x, y, 1.0)
    between = fine_tune_linear_probe(first, x, y, 1e-2)
    start = fit_linear_probe(*first, 1e-2, scaling=between.scaling)
    apart = np.linalg.norm(between.weights - start.weights)
    alone = fit_linear_probe(x, y, 1e-2)
    assert 0 < apart < np.linalg.norm(alone.weights - start.weights)
    assert loose.converged
    assert (loose.predict(x) == plain.predict(x)).mean() > 0.9
    assert loose.probabilities(x, sorted(set(y))).sum(axis=1) == pytest.approx(1.0)


def test_a_class_that_was_not_learnt_has_probability_zero() -> None:
    x, y = _blobs(200, 3, 3)
    keep = y != "c1"
    found = fit_linear_probe(x[keep], y[keep]).probabilities(x, ["c0", "c1", "c2"])
    assert np.all(found[:, 1] == 0)
    assert found.sum(axis=1) == pytest.approx(1.0)
    # Pre-training may lack a class that fine-tuning has, and the other way round.
    tuned = fine_tune_linear_probe((x[keep], y[keep]), x, y, 1.0)
    assert list(tuned.classes) == ["c0", "c1", "c2"]
    fewer = fine_tune_linear_probe((x, y), x[keep], y[keep], 1.0)
    assert list(fewer.classes) == ["c0", "c2"]
    assert (fewer.predict(x[keep]) == y[keep]).mean() > 0.8


@pytest.mark.parametrize(("n_sites", "over"), [(2, "patients"), (4, "sites")])
def test_folds_share_no_patient(n_sites: int, over: str) -> None:
    rng = np.random.default_rng(0)
    patients = rng.integers(0, 30, 400).astype(str)
    sites = rng.integers(0, n_sites, 400).astype(str)  # patients at several sites
    labels = rng.integers(0, 3, 400)
    found, folds = linear_probe._folds(labels, patients, sites, 0)
    assert found == "patients"  # each patient is at every site, so no site could be left out
    assert len(folds) == 5
    for learn, judge in folds:
        assert not set(patients[learn]) & set(patients[judge])
    clear = np.array([f"{s}-{p}" for s, p in zip(sites, patients, strict=True)])
    found, folds = linear_probe._folds(labels, clear, sites, 0)
    assert found == over
    assert len(folds) == (5 if over == "patients" else 4)
    for learn, judge in folds:
        assert not set(clear[learn]) & set(clear[judge])
        if over == "sites":
            assert not set(sites[learn]) & set(sites[judge])


def test_c_is_strong_where_patients_mislead() -> None:
    """Few patients and many noise features: weak regularisation learns the patients by heart."""
    rng = np.random.default_rng(2)
    patients = np.repeat(np.arange(24), 10)
    labels = (patients % 2).astype(str)
    own = rng.normal(size=(24, 60)) * 3
    x = own[patients] + rng.normal(size=(240, 60))
    x[:, 0] = patients % 2 + rng.normal(size=240) * 0.3
    choice = choose_regularisation(x, labels, patients.astype(str), np.full(240, "s"), 0)
    assert choice.over == "patients"
    assert choice.chosen
    assert choice.value == choice.grid[int(np.argmax(choice.scores))]
    assert choice.value < 100
    # Nothing to choose from: one patient.
    alone = choose_regularisation(x[:10], np.array(["0", "1"] * 5), np.full(10, "p"), np.full(10, "s"), 0)
    assert not alone.chosen
    assert alone.value == 1.0


def test_c_knows_nothing_of_the_test_patients(world: World) -> None:
    study = open_study(world.settings("choose"))
    rng = np.random.default_rng(0)
    real = rng.normal(size=(len(study.index), 4)).astype(np.float32)
    chosen = linear_probe_classifier(study, real, 0, 0)
    others = np.setdiff1d(np.arange(len(study.index)), study.train)
    spoiled = real.copy()
    spoiled[others] = np.nan  # reading any of them would fail
    again = linear_probe_classifier(study, spoiled, 0, 0)
    assert again.record == chosen.record
    about = chosen.record.regularisation
    assert about is not None
    assert about["over"] == "sites"
    assert about["n_patches"] == len(study.train)
    assert chosen.regularisation == about["value"]
    assert linear_probe_classifier(study, real, 0.5, 0).regularisation == 0.5


def test_one_c_for_every_training_set(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from latent_medi.evaluation.downstream import classifiers

    used: list[float] = []

    def listen(*arguments: Any, **named: Any) -> linear_probe.LinearProbe:
        used.append(arguments[2])
        return fit_linear_probe(*arguments, **named)

    monkeypatch.setattr(classifiers, "fit_linear_probe", listen)
    settings = world.settings("one-c", regularisation=0.0, repeats=1, training_sets=["real", "medi", "oversample"])
    result = evaluate(settings, [filters()])
    downstream = result.downstream["filters"]
    chosen = downstream.classifier.regularisation
    assert chosen is not None
    assert chosen["chosen"] is True
    assert len(used) == 4 + 1  # and the one that all start from
    assert set(used) == {chosen["value"]}
    assert set(downstream.training_sets) == {"real", "medi", "oversample"}


def test_what_does_not_converge_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(linear_probe, "MAX_ITER", 1)
    x, y = _blobs(200, 3, 4)
    with caplog.at_level(logging.WARNING):
        assert not fit_linear_probe(x, y).converged
    assert "did not converge in 1 iterations" in caplog.text
    assert not fine_tune_linear_probe((x, y), x[:50], y[:50]).converged


@pytest.mark.parametrize("values", [2, 3])
def test_log_probabilities_are_those_of_scikit_learn(values: int) -> None:
    rng = np.random.default_rng(0)
    labels = np.array([f"v{i % values}" for i in range(120)])
    features = rng.normal(size=(120, 5)) + 1.5 * (np.arange(120) % values)[:, None]
    probe = fit_validated_linear_probe(features, labels, np.array([f"p{i // 6}" for i in range(120)]))
    model = LogisticRegression()
    model.classes_, model.coef_, model.intercept_ = probe.classes, probe.weights, probe.intercept
    scaler = StandardScaler().fit(features)
    expected = model.predict_log_proba(scaler.transform(features))
    for code, value in enumerate(probe.values):
        found = probe.log_probability(features, np.full(120, value))
        assert found == pytest.approx(expected[:, code], rel=1e-6, abs=1e-9)
    far = probe.log_probability(features.max(0) * np.array([[4.0], [5.0], [6.0]]), np.full(3, probe.values[-1]))
    assert far[0] < far[1] < far[2] < 0  # ranked on, where a probability is rounded to 1


def test_a_probe_is_checked_on_other_patients() -> None:
    """Features that name the patient and nothing else: right on its own patients, chance on others."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 5)
    features = rng.normal(size=(40, 30))[patients] + rng.normal(0, 0.01, (200, 30))
    labels = np.array(["a", "b"])[patients % 2]
    probe = fit_validated_linear_probe(features, labels, patients.astype(str), regularisation=1.0)
    assert (probe.predict(features) == labels).mean() > 0.95
    assert probe.accuracy < 0.75
    assert fit_validated_linear_probe(features, labels, patients.astype(str)).regularisation < 0.1
