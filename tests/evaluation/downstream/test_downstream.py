"""The score that counts, by hand and on a planted cohort; equal budgets; rivals with every advantage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from evaluation_world import HELD_OUT, World

from latent_medi.evaluation.cohort.combinations import among, matches
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.downstream import baselines
from latent_medi.evaluation.downstream.shift_accuracy import Scorer
from latent_medi.evaluation.downstream.training_sets import Drawer, balancing_weights, make_plan
from latent_medi.metadata.schema import Field, Schema
from latent_medi.shards.dataset import PatchDataset


def _hand_study() -> Study:
    schema = Schema((Field("class", "class", ("a", "b")), Field("site", "categorical", ("s", "t"))))
    rows = [  # class, site, patient
        ("a", "t", "1"), ("a", "t", "1"), ("a", "t", "1"), ("a", "t", "2"),
        ("b", "t", "3"), ("b", "t", "3"), ("b", "t", "1"),
        ("a", "s", "4"), ("b", "s", "5"),
    ]  # fmt: skip
    index = pd.DataFrame(rows, columns=["class", "site", "patient"]).assign(origin="real", key="k", slide="one")
    real = cast(PatchDataset, SimpleNamespace(index=index, schema=schema))
    empty, test = np.zeros(0, int), np.arange(9)
    return Study(
        real, "class", "site", [{"class": "b", "site": "t"}], {}, empty, empty, empty, empty, test, test, "none", []
    )


def test_accuracy_shift_by_hand() -> None:
    scorer = Scorer(_hand_study(), [{"class": "b", "site": "t"}], 20, 0)
    predicted = np.array([["a", "b", "b", "a", "b", "a", "a", "b", "b"]])
    result = scorer.score(predicted)
    # Site t only. Class a: patient 1 has 1/3, patient 2 has 1 -> 2/3.
    # Class b: patient 3 has 1/2, patient 1 has 0 -> 1/4.
    assert result["accuracy_shift"]["value"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert result["accuracy_shift"]["n_patches"] == 7
    assert result["accuracy_shift"]["n_patients"] == 3
    assert result["accuracy_shift"]["interval"] == "not estimable"
    assert result["accuracy_in_distribution"]["value"] == pytest.approx((0 + 1) / 2)
    assert result["accuracy_seen"]["value"] == pytest.approx(((1 / 3 + 1 + 0) / 3 + 1) / 2)
    assert result["accuracy_unseen"]["value"] == pytest.approx(1 / 4)
    (cell,) = result["cells"]
    assert cell["recall"]["value"] == pytest.approx(1 / 4)
    # Of class a at site t: patient 1 is called b in 2/3, patient 2 never.
    assert cell["false_positive_rate"]["value"] == pytest.approx((2 / 3 + 0) / 2)


def test_a_gain_in_recall_alone_is_no_headline() -> None:
    scorer = Scorer(_hand_study(), [{"class": "b", "site": "t"}], 20, 0)
    always = scorer.score(np.full((1, 9), "b"))
    assert always["cells"][0]["recall"]["value"] == 1.0
    assert always["cells"][0]["false_positive_rate"]["value"] == 1.0
    assert always["accuracy_shift"]["value"] == 0.5


def test_planted_cohort(metrics: dict[str, Any]) -> None:
    record = metrics["downstream"]["filters"]
    scores = {a: v["accuracy_shift"]["value"] for a, v in record["arms"].items()}
    assert set(scores) == {
        "real", "oversample", "reweight", "stain_augmentation", "stain_transfer", "nearest_site", "cls", "medi",
        "synthetic_only_cls", "synthetic_only_medi", "pretrain_finetune_cls", "pretrain_finetune_medi", "oracle",
    }  # fmt: skip
    assert scores["reweight"] == record["arms"]["oversample"]["variants"]["balance"]
    assert scores["medi"] > max(scores[rival] for rival in ("stain_augmentation", "nearest_site", "reweight"))
    assert scores["synthetic_only_medi"] > scores["synthetic_only_cls"]
    assert scores["oracle"] > scores["real"] + 0.1
    assert record["differences"]["oracle - real"]["accuracy_shift"]["interval"][0] > 0
    assert scores["medi"] > scores["stain_transfer"] > scores["real"]
    assert abs(scores["cls"] - scores["real"]) < 0.08
    assert record["not_converged"] == []
    assert record["affected_sites"] == ["south"]


def test_every_arm_adds_the_same_number_to_each_cell(world: World) -> None:
    study = open_study(world.settings("plan"))
    plan = make_plan(study, 0, 0)
    names = [tuple(c.values()) for c in plan.cells]
    # stripes × south × frozen is part of stripes × south.
    assert names == [("stripes", "south"), ("blobs", "south", "frozen"), ("rings", "south", "frozen")]
    made = plan.made(lambda images: np.zeros((len(images), 2)))
    arms = {a.name: np.arange(len(a.index), dtype=float)[:, None].repeat(2, 1) for a in study.synthetic.values()}
    drawer = Drawer(study, plan, np.arange(len(study.index), dtype=float)[:, None].repeat(2, 1), arms, made)
    total = len(study.train) + sum(plan.counts)
    for arm, variants in drawer.variants().items():
        for variant in variants:
            if arm.startswith(("synthetic_only_", "pretrain_finetune_")):
                continue
            added = drawer.draw(arm, variant, 0)
            expected = [] if arm == "real" or variant == "balance" else plan.counts
            labels = [c["class"] for c, n in zip(plan.cells, expected, strict=False) for _ in range(n)]
            assert sorted(added.labels) == sorted(labels), (arm, variant)
            assert len(drawer.lesson(arm, variant, 0).labels) == len(study.train) + len(labels)
    # What learns from synthetic patches alone gets as many as the other arms have in all, class by class.
    whole = drawer.lesson("synthetic_only_medi", "synthetic_only_medi", 0)
    like = drawer.lesson("medi", "medi", 0)
    assert whole.n_synthetic == len(whole.labels) == total
    assert sorted(whole.labels) == sorted(like.labels)
    first = drawer.lesson("pretrain_finetune_cls", "pretrain_finetune_cls", 0)
    assert first.first is not None
    assert len(first.first[1]) == total
    assert np.array_equal(first.features, drawer.real[study.train])
    # No arm sees a patient that it is judged on: the oracle adds patches of probe patients, oversampling of training.
    for arm, rows in (("oracle", study.probe), ("oversample", study.train), ("nearest_site", study.train)):
        added = drawer.draw(arm, drawer.variants()[arm][0], 0).features[:, 0].astype(int)
        assert len(added)
        assert set(added) <= set(rows)
        assert not set(study.patients[added]) & set(study.patients[study.test])
    # The class-only arm serves the cells of a class without repeats.
    assert drawer.draw("cls", "cls", 0).distinct == plan.counts
    assert not np.array_equal(drawer.draw("medi", "medi", 0).features, drawer.draw("medi", "medi", 1).features)


def test_stain_transfer_reaches_the_target_site(world: World) -> None:
    study = open_study(world.settings("stain"))
    cell = {"class": "stripes", "site": "south"}
    result = baselines.stain_transfer(study, cell, 20, 0)
    assert result is not None
    assert len(result.rows) == 20
    table = study.index.iloc[result.rows]
    assert set(table["class"]) == {"stripes"}
    assert dict(table["site"].value_counts()) == {"east": 10, "north": 10}
    assert set(table["split_main"]) == {"train"}
    target = study.real.read(among(study.test, matches(study.index, cell))).reshape(-1, 3).mean(0)
    before = np.abs(study.real.read(result.rows).reshape(-1, 3).mean(0) - target).max()
    after = {m: np.abs(images.reshape(-1, 3).mean(0) - target).max() for m, images in result.images.items()}
    # The planted stain is a single one, which only the method without stain vectors can follow exactly.
    assert after["reinhard"] < 0.4 * before
    assert after["macenko"] < before
    assert baselines.stain_transfer(study, {"class": "stripes", "preparation": "frozen"}, 5, 0) is None


def test_stain_transfer_prefers_patches_that_have_the_other_values(world: World) -> None:
    study = open_study(world.settings("stain"))
    result = baselines.stain_transfer(study, {"class": "blobs", "site": "south", "preparation": "frozen"}, 10, 0)
    assert result is not None
    assert set(study.index.iloc[result.rows]["preparation"]) == {"frozen"}


def test_balancing_weights_equalise_cells(world: World) -> None:
    study = open_study(world.settings("weights"))
    weights = balancing_weights(study)
    table = study.index.iloc[study.train]
    sums = pd.Series(weights).groupby([table["class"].to_numpy(), table["site"].to_numpy()]).sum()
    assert sums.max() == pytest.approx(sums.min())
    assert weights.mean() == pytest.approx(1.0)


def test_predictions_reproduce_the_headline(world: World, metrics: dict[str, Any]) -> None:
    table = pd.read_csv(world.root / "full" / "predictions.csv", dtype={"patient": str})
    table = table[table["encoder"] == "filters"]
    assert len(table) == 12 * 9 * 4
    assert int(table["unseen"].sum()) == sum(
        bool(any(all(r[k] == v for k, v in c.items()) for c in HELD_OUT)) for _, r in table.iterrows()
    )
    shift = table[table["site"] == "south"]
    for arm, value in metrics["headline"]["accuracy_shift"].items():
        by_patient = shift.groupby(["class", "patient"])[f"right_{arm}"].mean()
        assert by_patient.groupby("class").mean().mean() == pytest.approx(value, abs=1e-3)
