"""The right n for everyone, Fréchet distances where there are patches enough, and planted generators in order."""

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
from latent_medi.evaluation.fidelity.neighbourhoods import neighbourhoods
from latent_medi.evaluation.fidelity.real_split_range import real_splits
from latent_medi.shards.writing.writer import write_dataset


def test_no_set_has_more_patches_than_other_real_patients(metrics: dict[str, Any]) -> None:
    for encoder in metrics["fidelity"].values():
        for section in ("unseen", "per_class"):
            for combination in encoder[section]["combinations"]:
                assert set(combination["sources"]) == {"medi", "cls", "real"}
                most = combination["sources"]["real"]["n_patches"]
                assert all(found["n_patches"] <= most for found in combination["sources"].values())
                assert all(found["mix_mismatch"] <= 0.021 for found in combination["sources"].values())


def test_a_further_set_changes_no_other(world: World) -> None:
    """Not what is compared, how many patches of it, in which dimensions, nor any distance."""
    few = world.root / "few-samples"
    patches = [p for p in synthetic_patches(40, None, False) if p.fields["class"] == "rings"][::2]
    write_dataset(few, patches, "few", SCHEMA, SIZE, 0.5)
    both = {"medi": str(world.medi), "cls": str(world.cls)}
    found = [
        evaluated(world.settings(name, synthetic=arms, downstream=False), [filters()])["fidelity"]["filters"]
        for name, arms in (("two-sets", both), ("three-sets", both | {"few": str(few)}))
    ]
    for section in ("unseen", "per_class", "per_site", "whole"):
        two, three = (each[section] for each in found)
        assert [three[key] for key in ("pca_dims", "ratio", "frechet_ratio")] == [
            two[key] for key in ("pca_dims", "ratio", "frechet_ratio")
        ]
        for before, after in zip(two["combinations"], three["combinations"], strict=True):
            assert {name: after["sources"][name] for name in before["sources"]} == before["sources"]
        assert {name: three["means"][name] for name in two["means"]} == two["means"]
    assert found[1]["overall"].keys() >= found[0]["overall"].keys()
    assert {name: found[1]["overall"][name] for name in found[0]["overall"]} == found[0]["overall"]
    assert any("few" in cell["sources"] for cell in found[1]["per_class"]["combinations"])


def test_a_perfect_generator_is_at_no_distance(metrics: dict[str, Any]) -> None:
    for encoder in metrics["fidelity"].values():
        unseen = encoder["unseen"]["means"]
        assert unseen["real"]["interval"][0] < 0 < unseen["real"]["interval"][1]
        assert abs(unseen["real"]["value"]) < unseen["cls"]["value"] / 4
        for section, most in (("unseen", 0.3), ("per_class", 0.5)):
            ratio = encoder[section]["ratio"]
            # Without colour class alone may be as near as real patients are.
            assert (
                ratio["value"] < most
                if encoder is metrics["fidelity"]["filters"]
                else ratio["value"] or ratio["reason"]
            )
        assert encoder["overall"]["medi"]["coverage"] > encoder["overall"]["cls"]["coverage"]
    ratio = metrics["fidelity"]["filters"]["unseen"]["frechet_ratio"]
    assert abs(ratio["perfect"]) < 1
    assert ratio["perfect_error"] < 0.2
    assert ratio["value"] < 0.5


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
    assert blind["fd"]["value"] > 1.3 * blind["fd"]["range"][1]
    assert perfect["kid"]["range"][0] < 0 < perfect["kid"]["range"][1]


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


def test_rank_deficient_sets_have_no_frechet_distance(world: World) -> None:
    result = evaluated(world.settings("deficient", downstream=False, protocol="paper"), [filters(60)])
    unseen = result["fidelity"]["filters"]["unseen"]
    for combination in unseen["combinations"]:
        for found in combination["sources"].values():
            assert found["fd"] is None
            assert unseen["pca_dims"] <= combination["n_reference"] / 4
            assert (found["fd_pca"] is None) == (found["n_patches"] < 4 * unseen["pca_dims"])
            assert found["fd_raw_label"] == "rank-deficient: compare only at equal n"


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
