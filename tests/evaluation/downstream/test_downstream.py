"""The score that counts, by hand and on a planted cohort; equal budgets; baselines with every advantage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pandas as pd
import pytest
from evaluation_world import HELD_OUT, World

from latent_medi.evaluation.cohort.combinations import among, matches
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream import baselines
from latent_medi.evaluation.downstream.compare import choose
from latent_medi.evaluation.downstream.registry import entries, plan_additions
from latent_medi.evaluation.downstream.shift_accuracy import Scorer
from latent_medi.evaluation.downstream.training_sets import Sources, TrainingSet, balancing_weights
from latent_medi.evaluation.results import Metrics
from latent_medi.evaluation.summary import headline
from latent_medi.metadata.schema import Field, Schema
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.differences import Draws

ONCE = Draws(None, [0])
"""One repeat of something that does not depend on chance."""


def _hand_study() -> Study:
    schema = Schema((Field("class", "class", ("a", "b")), Field("site", "categorical", ("s", "t"))))
    rows = {"class": list("aaaabbbab"), "site": list("tttttttss"), "patient": list("111233145")}
    index = pd.DataFrame(rows).assign(origin="real", key="k", slide="one")
    real = cast(PatchDataset, SimpleNamespace(index=index, schema=schema))
    empty, test = np.zeros(0, int), np.arange(9)
    return Study(
        real, "class", "site", [{"class": "b", "site": "t"}], {}, empty, empty, empty, empty, test, test, "none", []
    )


def test_accuracy_shift_by_hand() -> None:
    scorer = Scorer(_hand_study(), [{"class": "b", "site": "t"}])
    predicted = np.array([["a", "b", "b", "a", "b", "a", "a", "b", "b"]])
    result = scorer.accuracies(scorer.scored(predicted, ONCE))
    # Site t only. Class a: patient 1 has 1/3, patient 2 has 1 -> 2/3.
    # Class b: patient 3 has 1/2, patient 1 has 0 -> 1/4.
    assert result.accuracy_shift.value == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert scorer.accuracy_shift(predicted) == result.accuracy_shift.value
    assert result.accuracy_shift.n_patches == 7
    assert result.accuracy_shift.n_patients == 3
    assert result.accuracy_shift.interval == "not estimable"
    assert result.accuracy_in_distribution.value == pytest.approx((0 + 1) / 2)
    assert result.accuracy_seen.value == pytest.approx(((1 / 3 + 1 + 0) / 3 + 1) / 2)
    assert result.accuracy_unseen.value == pytest.approx(1 / 4)
    (scores,) = scorer.by_combination(predicted, ONCE)
    assert scores.recall.value == pytest.approx(1 / 4)
    # Of class a at site t: patient 1 is called b in 2/3, patient 2 never.
    assert scores.false_positive_rate.value == pytest.approx((2 / 3 + 0) / 2)


def test_a_gain_in_recall_alone_is_no_headline() -> None:
    scorer = Scorer(_hand_study(), [{"class": "b", "site": "t"}])
    always = np.full((1, 9), "b")
    (scores,) = scorer.by_combination(always, ONCE)
    assert scores.recall.value == 1.0
    assert scores.false_positive_rate.value == 1.0
    assert scorer.accuracies(scorer.scored(always, ONCE)).accuracy_shift.value == 0.5


def test_planted_cohort(results: Metrics) -> None:
    record = results.downstream["filters"]
    scores = {name: result.accuracy_shift.value or 0.0 for name, result in record.training_sets.items()}
    assert set(scores) == set(entries(["medi", "cls"]))
    assert scores["reweight"] == record.training_sets["oversample"].variants["balance"]
    assert scores["medi"] > max(scores[name] for name in ("stain_augmentation", "nearest_site", "reweight"))
    assert scores["synthetic_only_medi"] > scores["synthetic_only_cls"]
    assert scores["oracle"] > scores["real"] + 0.1
    interval = record.differences["oracle"]["real"].accuracy_shift.interval
    assert isinstance(interval, tuple)
    assert interval[0] > 0
    assert scores["medi"] > scores["stain_transfer"] > scores["real"]
    assert abs(scores["cls"] - scores["real"]) < 0.08
    assert record.not_converged == []
    assert record.affected_sites == ["south"]
    roles = {name: result.role for name, result in record.training_sets.items()}
    assert (roles["medi"], roles["cls"], roles["real"]) == ("candidate", "baseline", "baseline")
    assert (roles["oracle"], roles["synthetic_only_medi"]) == ("oracle", "ablation")


def test_every_training_set_adds_the_same_number_to_each_combination(world: World) -> None:
    study = open_study(world.settings("plan"))
    additions = plan_additions(study, 0, 0, 0.2)
    names = [tuple(c.values()) for c in additions.combinations]
    # stripes × south × frozen is part of stripes × south.
    assert names == [("stripes", "south"), ("blobs", "south", "frozen"), ("rings", "south", "frozen")]
    derived = additions.derived_features(lambda images: np.zeros((len(images), 2)))
    numbers = {s.name: np.arange(len(s.index), dtype=float)[:, None].repeat(2, 1) for s in study.synthetic.values()}
    real = np.arange(len(study.index), dtype=float)[:, None].repeat(2, 1)
    sites = baselines.nearest_sites(study, additions.combinations, real)
    sources = Sources(study, additions, real, numbers, derived, sites)
    chosen, reasons = choose(sources, [])
    assert reasons == {}

    def built(name: str, seed: int = 0, variant: int = 0) -> TrainingSet:
        build = list(chosen[name].variants.values())[variant]
        return build(sources, chosen[name].synthetic, seed)

    total = len(study.train) + sum(additions.counts)
    for name, entry in chosen.items():
        if entry.kind.role == "ablation":
            continue
        for i, variant in enumerate(entry.variants):
            training_set = built(name, 0, i)
            expected = [] if variant in ("real", "balance") else additions.counts
            labels = [c["class"] for c, n in zip(additions.combinations, expected, strict=False) for _ in range(n)]
            assert sorted(training_set.labels[len(study.train) :]) == sorted(labels), (name, variant)
    # What is trained on synthetic patches alone has as many as the other training sets, class by class.
    whole, like = built("synthetic_only_medi"), built("medi")
    assert whole.n_synthetic == len(whole.labels) == total
    assert sorted(whole.labels) == sorted(like.labels)
    first = built("pretrain_finetune_cls")
    assert first.pretraining is not None
    assert len(first.pretraining[1]) == total
    assert np.array_equal(first.features, real[study.train])
    # No training set has a test patient: the oracle adds probe patients' patches, oversampling training patients'.
    for name, rows in (("oracle", study.probe), ("oversample", study.train), ("nearest_site", study.train)):
        added = built(name).features[len(study.train) :, 0].astype(int)
        assert len(added)
        assert set(added) <= set(rows)
        assert not set(study.patients[added]) & set(study.patients[study.test])
    # The class-only set serves the combinations of a class without repeats.
    assert built("cls").distinct == additions.counts
    assert not np.array_equal(built("medi").features, built("medi", 1).features)


def test_stain_transfer_reaches_the_target_site(world: World) -> None:
    study = open_study(world.settings("stain"))
    combination = {"class": "stripes", "site": "south"}
    result = baselines.stain_transfer(study, combination, 20, 0)
    assert result is not None
    assert len(result.rows) == 20
    table = study.index.iloc[result.rows]
    assert set(table["class"]) == {"stripes"}
    assert dict(table["site"].value_counts()) == {"east": 10, "north": 10}
    assert set(table["split_main"]) == {"train"}
    target = study.real.read(among(study.test, matches(study.index, combination))).reshape(-1, 3).mean(0)
    before = np.abs(study.real.read(result.rows).reshape(-1, 3).mean(0) - target).max()
    after = {m: np.abs(images.reshape(-1, 3).mean(0) - target).max() for m, images in result.images.items()}
    # The planted stain is a single one, which only the method without stain vectors can follow exactly.
    assert after["reinhard"] < 0.4 * before
    assert after["macenko"] < before
    assert baselines.stain_transfer(study, {"class": "stripes", "preparation": "frozen"}, 5, 0) is None


def test_stain_transfer_prefers_patches_with_the_other_values(world: World) -> None:
    study = open_study(world.settings("stain"))
    result = baselines.stain_transfer(study, {"class": "blobs", "site": "south", "preparation": "frozen"}, 10, 0)
    assert result is not None
    assert set(study.index.iloc[result.rows]["preparation"]) == {"frozen"}


def test_balancing_weights_equalise_class_by_site_cells(world: World) -> None:
    study = open_study(world.settings("weights"))
    weights = balancing_weights(study)
    table = study.index.iloc[study.train]
    sums = pd.Series(weights).groupby([table["class"].to_numpy(), table["site"].to_numpy()]).sum()
    assert sums.max() == pytest.approx(sums.min())
    assert weights.mean() == pytest.approx(1.0)


def test_predictions_reproduce_the_headline(world: World, results: Metrics) -> None:
    table = pd.read_csv(world.root / "full" / "predictions.csv", dtype={"patient": str})
    table = table[table["encoder"] == "filters"]
    assert len(table) == 12 * 9 * 4
    assert int(table["unseen"].sum()) == sum(
        bool(any(all(r[k] == v for k, v in c.items()) for c in HELD_OUT)) for _, r in table.iterrows()
    )
    shift = table[table["site"] == "south"]
    for name, value in headline(results).accuracy_shift.items():
        by_patient = shift.groupby(["class", "patient"])[f"right_{name}"].mean()
        assert by_patient.groupby("class").mean().mean() == pytest.approx(value, abs=1e-3)
