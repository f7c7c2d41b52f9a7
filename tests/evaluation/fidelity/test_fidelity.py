"""Equal n for everyone, the right metric for the sample size, and planted generators in the right order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from evaluation_world import SCHEMA, SIZE, World, evaluated, filters, synthetic_patches
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.evaluation.cohort.matching import Matched
from latent_medi.evaluation.evaluate import evaluate
from latent_medi.evaluation.fidelity.distance_to_real import frechet_draws, kid_draws
from latent_medi.evaluation.fidelity.neighbourhoods import neighbourhoods
from latent_medi.evaluation.fidelity.real_split_range import real_splits
from latent_medi.shards.writing.writer import write_dataset
from latent_medi.statistics.distances import frechet_distance
from latent_medi.statistics.kernel_distance import kid


def test_every_source_has_one_n(metrics: dict[str, Any]) -> None:
    for encoder in metrics["fidelity"].values():
        for section in ("unseen", "per_class"):
            for combination in encoder[section]["combinations"]:
                assert set(combination["sources"]) == {"medi", "cls", "real"}
                assert len({found["n_patches"] for found in combination["sources"].values()}) == 1
                assert all(found["mix_mismatch"] <= 0.021 for found in combination["sources"].values())


def test_a_perfect_generator_lies_near_the_floor(metrics: dict[str, Any]) -> None:
    for encoder in metrics["fidelity"].values():
        unseen = encoder["unseen"]["means"]
        assert encoder["unseen"]["metric"] == "fd"
        assert unseen["real"]["value"] < unseen["cls"]["value"]
        assert encoder["unseen"]["ratio"]["value"] < 0.3
        assert unseen["cls"]["interval"][0] > unseen["medi"]["interval"][1]
        assert encoder["per_class"]["ratio"]["value"] < 0.5
        assert encoder["overall"]["medi"]["coverage"] > encoder["overall"]["cls"]["coverage"]


def test_only_what_real_patients_do_not_do_is_called_worse(metrics: dict[str, Any]) -> None:
    record = metrics["fidelity"]["filters"]["real_splits"]
    assert record["fd_dims"] == 16
    assert min(record["n_patients"]) >= 100
    perfect, blind = record["synthetic"]["medi"], record["synthetic"]["cls"]
    assert {"fd", "kid", "class_mix", "precision", "recall", "density", "coverage", "coverage_lowest"} == set(perfect)
    assert sum(entry["worse"] for entry in perfect.values()) <= 1
    assert all(entry["range"][0] <= entry["real"] <= entry["range"][1] for entry in perfect.values())
    # Class alone draws the training patches' mix of sites, not the test patches'.
    assert blind["fd"]["worse"]
    assert blind["fd"]["value"] > 1.5 * blind["fd"]["range"][1]


def test_sites_are_judged_like_classes(metrics: dict[str, Any]) -> None:
    record = metrics["fidelity"]["filters"]["per_site"]
    assert [each["name"] for each in record["combinations"]] == ["east", "north", "south"]
    assert record["means"]["medi"]["value"] < record["means"]["cls"]["value"]


def test_any_cell_is_judged_by_itself(world: World) -> None:
    settings = world.settings("cells", by_fields=[["class", "site"]], downstream=False)
    found = evaluated(settings, [filters()])["fidelity"]["filters"]["by_fields"]["class × site"]["combinations"]
    assert [each["name"] for each in found][:4] == ["blobs × east", "blobs × north", "blobs × south", "rings × east"]
    assert len(found) == 9
    assert all({"medi", "real"} <= set(each["sources"]) for each in found)
    with pytest.raises(UserError, match=r"by_fields names 'sites', no class or categorical field.*'site'"):
        evaluate(world.settings("cells", by_fields=[["sites"]]), [filters()])


def test_patients_are_dealt_whole_and_by_stratum() -> None:
    patients, strata = np.repeat([f"p{i}" for i in range(30)], 3), np.repeat(["a", "b", "b"], 30)
    counts = []
    for first, second in real_splits(patients, strata, 0.45, 60, 1):
        assert not set(patients[first]) & set(patients[second])
        assert sorted([*first, *second]) == list(range(90))
        counts.append([len(set(patients[first][strata[first] == name])) for name in "ab"])
    assert set(map(tuple, counts)) <= {(4, 9), (5, 9)}
    assert np.mean(counts, axis=0) == pytest.approx([4.5, 9.0], abs=0.2)


def test_a_generator_without_the_site_is_no_better_than_class_alone(world: World) -> None:
    folder = world.root / "wrong"
    write_dataset(folder, list(synthetic_patches(40, {"south": "east"}, False)), "wrong", SCHEMA, SIZE, 0.5)
    changed = world.settings("wrong", synthetic={"medi": str(folder), "cls": str(world.cls)}, downstream=False)
    result = evaluated(changed, [filters()])
    assert result["fidelity"]["filters"]["unseen"]["ratio"]["value"] > 0.7
    assert result["headline"]["recovery_site"]["found"] < 0.1
    assert result["downstream"] == {}
    assert result["headline"]["verdict"]["answer"] == "no verdict"


def test_rank_deficient_sets_headline_kid(world: World) -> None:
    result = evaluated(world.settings("deficient", downstream=False, protocol="paper"), [filters(60)])
    unseen = result["fidelity"]["filters"]["unseen"]
    assert unseen["metric"] == "kid"
    assert result["headline"]["fd_unseen"]["metric"] == "kid"
    for combination in unseen["combinations"]:
        for found in combination["sources"].values():
            assert found["value"] == found["kid"]
            assert found["fd"] is None
            assert unseen["pca_dims"] <= min(found["n_patches"], combination["n_reference"]) / 4
            assert found["fd_raw_label"] == "rank-deficient: compare only at equal n"


def test_unit_weights_give_the_point_estimates() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 5)), rng.normal(size=(40, 5)) + 0.3
    ones_a, ones_b = np.ones((1, 50)), np.ones((1, 40))
    for weights_b in (None, ones_b):
        assert frechet_draws(a, b, ones_a, weights_b)[0] == pytest.approx(frechet_distance(a, b), rel=1e-9)
        assert kid_draws(a, b, ones_a, weights_b)[0] == pytest.approx(kid(a, b), rel=1e-9)


def test_weights_are_copies() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(30, 4)), rng.normal(size=(30, 4))
    weights = rng.multinomial(30, np.full(30, 1 / 30), size=1).astype(float)
    copied = np.repeat(a, weights[0].astype(int), axis=0)
    assert frechet_draws(a, b, weights, None)[0] == pytest.approx(frechet_distance(copied, b), rel=1e-9)


def test_neighbourhoods_see_collapse_and_absence() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(300, 4))
    same = neighbourhoods(real, rng.normal(size=(300, 4)))
    assert same.precision > 0.8
    assert same.recall > 0.8
    assert same.density == pytest.approx(1.0, abs=0.25)
    assert same.coverage > 0.8
    collapsed = neighbourhoods(real, rng.normal(size=(300, 4)) * 0.01)
    assert collapsed.precision == 1.0
    assert collapsed.coverage < 0.2
    assert collapsed.recall < 0.1
    assert neighbourhoods(real, real + 100).precision == 0.0
    assert neighbourhoods(real[:4], real).precision is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=60),
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=60),
    st.integers(0, 99),
)
def test_matched_samples_follow_the_target(have: list[str], want: list[str], seed: int) -> None:
    rows = np.arange(100, 100 + len(have))
    pool = Matched(rows, np.array(have), np.array(want))
    drawn, mismatch = pool.draw(pool.largest, np.random.default_rng(seed))
    assert len(set(drawn)) == len(drawn) == pool.largest
    assert set(drawn) <= set(rows)
    if len(drawn):
        missing = np.mean([w not in have for w in want])
        assert mismatch <= missing + 0.02 + 1e-9
        got = {v: np.mean([have[r - 100] == v for r in drawn]) for v in "abc"}
        for v in "abc":
            assert got[v] >= np.mean([w == v for w in want]) - mismatch - 1 / len(drawn)
