"""The two published protocols: what goes in, and their numbers recomputed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_world import SCHEMA, SIZE, World, filters, synthetic_patches
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef

from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream import published_protocols
from latent_medi.evaluation.downstream.classifiers import Prediction
from latent_medi.evaluation.downstream.records import ClassifierRecord
from latent_medi.evaluation.downstream.stage import check_downstream
from latent_medi.evaluation.downstream.training_sets import TrainingSet
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.settings import EvaluateSettings, HistoDiffusionProtocolSettings, MediProtocolSettings
from latent_medi.shards.writing.writer import write_dataset


def _features(study: Study, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Noisy one-hot classes, and the row number last, far too small to be learnt from."""
    rng = np.random.default_rng(seed)

    def of(labels: np.ndarray) -> np.ndarray:
        hot = np.eye(3)[[study.classes.index(v) for v in labels]] + rng.normal(0, 0.8, (len(labels), 3))
        return np.column_stack([hot, np.arange(len(labels)) * 1e-9])

    arms = {a.name: of(a.index[study.class_field].to_numpy(str)) for a in study.synthetic.values()}
    return of(study.index[study.class_field].to_numpy(str)), arms


def test_mean_and_standard_error_by_hand() -> None:
    found = published_protocols.mean_over_seeds([0.5, 0.6, 1.0])
    assert found.mean == pytest.approx(0.7)
    assert found.sem == pytest.approx(np.sqrt((0.04 + 0.01 + 0.09) / 2) / np.sqrt(3))
    assert published_protocols.mean_over_seeds([0.5]).sem is None


def test_scores_by_hand() -> None:
    truth = np.array(["a", "a", "a", "b", "b", "c"])
    found = np.array(["a", "a", "b", "b", "c", "c"])
    accuracy, f1, sensitivity, specificity = published_protocols.macro_scores(truth, found)
    assert accuracy == pytest.approx(4 / 6)
    assert sensitivity == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert specificity == pytest.approx((3 / 3 + 3 / 4 + 4 / 5) / 3)
    assert f1 == pytest.approx(np.mean([2 * 1 * (2 / 3) / (1 + 2 / 3), 0.5, 2 * 0.5 / 1.5]))


def test_medi_protocol_takes_what_it_says(world: World) -> None:
    study = open_study(world.settings("medi-protocol"))
    labels, sites = (study.index[f].to_numpy(str) for f in ("class", "site"))
    for k, most in ((2, 0), (2, 7), (0, 7)):
        rows = published_protocols.medi_real(study, k, most, 3)
        assert set(rows) <= set(study.train)
        assert len(set(sites[rows])) == (k or 3)
        if most:
            assert dict(zip(*np.unique(labels[rows], return_counts=True), strict=True)) == dict.fromkeys(
                study.classes, 7
            )
    assert not np.array_equal(
        published_protocols.medi_real(study, 2, 7, 0), published_protocols.medi_real(study, 2, 7, 1)
    )

    real, arms = _features(study)
    settings = MediProtocolSettings(ratios=[0.0, 0.5], max_real=[9], sites=[2, 0], seeds=2)
    record = published_protocols.medi_protocol(study, "f", real, arms, settings)
    assert [(r.training_set, r.sites, r.ratio) for r in record.rows] == [
        (arm, k, ratio) for k in (2, 3) for arm, ratio in (("real", 0.0), ("medi", 0.5), ("cls", 0.5))
    ]
    assert record.not_converged == 0
    assert record.test.n_patches == len(study.test)
    for row in record.rows:
        assert row.n_synthetic == [int(row.ratio * n) for n in row.n_real]

    # One number by hand: two sites, seed 1, no synthetic patch.
    rows = published_protocols.medi_real(study, 2, 9, 1)
    model = LogisticRegression(class_weight="balanced", max_iter=5000).fit(real[rows], labels[rows])
    found, truth = model.predict(real[study.test]), labels[study.test]
    here = record.rows[0]
    assert here.balanced_accuracy.by_seed[1] == pytest.approx(balanced_accuracy_score(truth, found))
    assert here.mcc.by_seed[1] == pytest.approx(matthews_corrcoef(truth, found))
    by_site = [
        balanced_accuracy_score(truth[sites[study.test] == s], found[sites[study.test] == s]) for s in np.unique(sites)
    ]
    assert here.site_averaged_balanced_accuracy.by_seed[1] == pytest.approx(np.mean(by_site))

    with pytest.raises(UserError, match="asks for 9 sites; training has 3"):
        published_protocols.medi_protocol(study, "f", real, arms, MediProtocolSettings(sites=[9]))


class Keeping:
    """A classifier that keeps its training sets and predicts the first class."""

    random = False
    record = ClassifierRecord("linear")

    def __init__(self, study: Study) -> None:
        self.training_sets: list[TrainingSet] = []
        self.study = study

    def fit_predict(self, training_set: TrainingSet, seed: int) -> Prediction:
        self.training_sets.append(training_set)
        n, k = len(self.study.test), len(self.study.classes)
        return Prediction(np.full(n, self.study.classes[0]), np.full((n, k), 1 / k), True)


def test_histodiffusion_takes_the_best_first(world: World, tmp_path: Path) -> None:
    patches = list(synthetic_patches(60, None, False))
    made = write_dataset(tmp_path / "made", patches, "medi", SCHEMA, SIZE, 0.5)
    rng = np.random.default_rng(0)
    chosen, control = rng.random(len(made)) < 0.5, rng.random(len(made)) < 0.5
    score = rng.random(len(made))
    made.add_selection("best", {"": chosen, "_control": control, "_score": score}, {}, {})
    study = open_study(world.settings("histo", synthetic={"medi": str(tmp_path / "made")}))
    real, arms = _features(study)
    classifier = Keeping(study)
    settings = HistoDiffusionProtocolSettings(percent=[50.0, 900.0], seeds=2)
    record = published_protocols.histodiffusion_protocol(study, "f", real, arms, settings, classifier)
    assert [(r.training_set, r.choice, r.percent) for r in record.rows] == [
        ("real", "none", 0.0),
        *[("medi", choice, percent) for percent in (50.0, 900.0) for choice in ("selected", "random")],
    ]
    # One training set where nothing is random, one per seed where patches are drawn.
    assert len(classifier.training_sets) == 1 + 1 + 2 + 1 + 2
    labels = study.index["class"].to_numpy(str)[study.train]
    classes = made.index["class"].to_numpy(str)
    counts = {v: int((labels == v).sum()) for v in study.classes}
    added = [np.rint(s.features[len(labels) :, 3] * 1e9).astype(int) for s in classifier.training_sets]
    for value in study.classes:
        order = [r for r in np.argsort(score) if chosen[r] and classes[r] == value]
        mine = [r for r in added[1] if classes[r] == value]
        assert mine == order[: counts[value] // 2]
        most = [r for r in added[4] if classes[r] == value]
        assert most == order  # nine times the real ones are more than there are: all, none twice
    for rows in (added[2], added[3], added[5]):
        assert control[rows].all()
        assert len(set(rows)) == len(rows)
    assert len(added[2]) == sum(n // 2 for n in counts.values())
    assert not np.array_equal(added[2], added[3])
    assert record.rows[3].n_synthetic == int(chosen.sum())
    assert record.rows[0].accuracy.mean == pytest.approx(1 / 3)

    with pytest.raises(UserError, match="no selection 'bets'; closest: 'best'"):
        published_protocols.histodiffusion_protocol(
            study, "f", real, arms, HistoDiffusionProtocolSettings(selection="bets"), classifier
        )
    plain = open_study(world.settings("histo"))
    with pytest.raises(UserError, match="latent-medi select"):
        published_protocols.histodiffusion_protocol(plain, "f", real, _features(plain)[1], settings, classifier)


def test_a_protocol_is_one_setting(world: World) -> None:
    sizes = MediProtocolSettings(ratios=[0.0, 1.0], max_real=[20], sites=[0], seeds=2)
    settings = world.settings("protocol", downstream=False, downstream_protocol="medi", medi_protocol=sizes)
    result = evaluate(settings, [filters()])
    rows = result.protocols.medi["filters"].rows
    assert [r.training_set for r in rows] == ["real", "medi", "cls"]
    assert 0 <= rows[1].balanced_accuracy.mean <= 1
    assert result.downstream == {}
    assert result.protocols.histodiffusion == {}
    with pytest.raises(UserError, match="`selected`"):
        check_downstream(world.settings("wrong", downstream_protocol="histodiffusion", selected={"medi": "x"}))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"downstream_protocol": "mdi"}, "medi"),
        ({"protocol": "papre"}, "paper"),
        ({"classifier": "probe"}, "linear"),
        ({"downstream_arms": ["real"]}, "training_sets"),
        ({"deals": 20}, "real_splits"),
        ({"cells": []}, "by_fields"),
        ({"added_per_cell": 3}, "added_per_combination"),
        ({"regularisation": -1.0}, "regularisation"),
        ({"repeats": 0}, "repeats"),
        ({"stain_jitter": 1.5}, "stain_jitter"),
        ({"medi_protocol": {"seeds": 0}}, "seeds"),
        ({"medi_protocol": {"ratios": [-0.5]}}, "ratios"),
        ({"histodiffusion_protocol": {"percent": [-1.0]}}, "percent"),
    ],
)
def test_values_and_names_that_are_unknown_are_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        config.build(EvaluateSettings, values)
