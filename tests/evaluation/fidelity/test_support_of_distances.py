"""Distances have the mix, the patients and the interval that they say they have."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pandas as pd
import pytest
from evaluation_world import SCHEMA, SIZE, World, synthetic_patches
from parts import put_index

from latent_medi.core.records import encode
from latent_medi.evaluation.cohort.comparison_sets import Comparison, _mismatch, class_comparisons
from latent_medi.evaluation.cohort.matching import Matched, strata
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.cohort.roles import synthetic_roles
from latent_medi.evaluation.cohort.sample_size import thin_support
from latent_medi.evaluation.cohort.study import Study
from latent_medi.evaluation.fidelity import real_split_range
from latent_medi.evaluation.fidelity.distance_to_real import _thinned, distance_table, kernel_set
from latent_medi.evaluation.fidelity.features import Features
from latent_medi.evaluation.fidelity.frechet_ratio import frechet_ratio
from latent_medi.evaluation.fidelity.real_split_range import Patches, measures_of
from latent_medi.shards.writing.writer import write_dataset
from latent_medi.statistics.distances import frechet_distance, pca_basis
from latent_medi.statistics.kernel_distance import kernel_distance, kid, mean_distance


@pytest.mark.parametrize("trained", [True, False], ids=["training has it", "training lacks it"])
def test_a_side_of_another_mix_is_listed_and_not_judged(world: World, trained: bool) -> None:
    """Test patients of a hospital that no sample comes from, though training has it; and where training lacks it, what
    no sample can follow is not held against them.
    """
    folder = world.root / f"external-{trained}"
    shutil.copytree(world.real, folder)
    table = pd.read_parquet(folder / "index.parquet")
    test = table["split_main"] == "test"
    elsewhere = table["split_main"] == "probe" if trained else ~test
    table.loc[elsewhere & (table["site"] == "east"), "site"] = "north"
    table.loc[test & (table["site"] == "north"), "site"] = "east"  # samples are of the north alone: nothing is shared
    put_index(folder, table)
    made = world.root / f"external-medi-{trained}"
    patches = [p for p in synthetic_patches(40, None, False) if p.fields["site"] == "north"]
    write_dataset(made, patches, "medi", SCHEMA, SIZE, 0.5)
    arms = {"medi": str(made), "cls": str(world.cls)}
    study = open_study(world.settings(f"external-out-{trained}", real=str(folder), synthetic=arms))
    cells = class_comparisons(study, 0)
    rng = np.random.default_rng(0)
    real = rng.normal(size=(len(study.index), 4))
    made_of = {name: rng.normal(size=(len(arm.rows), 4)) for name, arm in study.synthetic.items()}
    left_out = distance_table(study, Features(real, made_of, pca_basis(real)), cells, 0).left_out
    for cell in cells:
        assert cell.skipped["real"] == "site is east in 67% of the reference, in 0% of other real patients"
        listed = f"real: {cell.skipped['real']}"
        if trained:
            assert cell.skipped["medi"] == "site is east in 67% of the reference, in 0% of its samples"
            listed = f"medi: {cell.skipped['medi']}; {listed}"
        assert left_out[cell.combination["class"]] == listed
        # A field that a model does not know, or whose values no model can know, is not held against its samples.
        assert set(cell.rows) == ({"cls"} if trained else {"cls", "medi"})
        assert cell.unmatched == ({} if trained else {"medi": ["site"]})


@pytest.mark.parametrize(("east", "apart"), [(20, ""), (21, "site is east in 21% of the reference, in 0%")])
def test_a_fifth_of_the_mix_may_be_of_another_site(east: int, apart: str) -> None:
    """Counted among what is known: patches of which the site is not told neither show nor lack one."""
    reference = pd.DataFrame({"site": ["east"] * east + ["north"] * (100 - east) + ["unknown"] * 300})
    theirs = pd.DataFrame({"site": ["north", "unknown", "unknown"]})
    assert _mismatch(theirs, reference, ["site"]) == apart
    assert _mismatch(theirs, reference[reference["site"] == "unknown"], ["site"]) == ""


def test_values_that_never_meet_do_not_make_up_a_mix(world: World) -> None:
    """The reference is of two kinds; a side has both sites and both preparations, but hardly together as there."""
    folder = world.root / "crossed"
    shutil.copytree(world.real, folder)
    table = pd.read_parquet(folder / "index.parquet")
    test, probe = table["split_main"] == "test", table["split_main"] == "probe"
    north = table["site"] == "north"
    table.loc[test, "preparation"] = np.where(north[test], "formalin", "frozen")
    table.loc[probe, "preparation"] = np.where(north[probe], "frozen", "formalin")
    rare = probe & north & ~table["patient"].str.endswith("-0")  # few are left of the north
    table.loc[rare | (test & (table["site"] == "south")), "split_main"] = ""
    put_index(folder, table)
    held_out = [{"class": "stripes", "site": "east"}]
    study = open_study(world.settings("crossed-out", real=str(folder), held_out=held_out, unseen=False))
    for cell in class_comparisons(study, 0):
        assert "of the reference, in" in cell.skipped["real"]


@pytest.mark.parametrize("n", [0, 1, 7])
def test_a_draw_follows_its_strata(n: int) -> None:
    rng = np.random.default_rng(n)
    labels = rng.choice(list("abcdx"), 200)
    target = rng.choice(list("abcy"), 50 * bool(n))
    pool = Matched(np.arange(1000, 1200), labels, target)
    names = sorted(set(target))
    assert [list(m) for m in pool.members] == [list(np.flatnonzero(labels == name)) for name in names]
    assert pool.missing == pytest.approx(np.mean(target == "y") if n else 0.0)


def test_a_side_without_a_patch_gives_no_draw(world: World) -> None:
    """Such as real patches that are neither training, probe nor reference patches, in a split of two parts."""
    index = open_study(world.settings("none")).index
    nothing = strata(index, np.zeros(0, int), ["class", "site"])
    some = strata(index, np.arange(5), ["class", "site"])
    assert (nothing.shape, some.shape) == ((0,), (5,))
    assert Matched(np.zeros(0, int), nothing, some).largest == 0


def test_thinning_keeps_the_mix_and_depends_on_nothing_else() -> None:
    sites = np.repeat([0, 1], [9000, 1000])
    shares = [sites[_thinned(10_000, seed, "medi")].mean() for seed in range(20)]
    assert np.mean(shares) == pytest.approx(0.1, abs=0.005)
    rows = _thinned(10_000, 0, "medi")
    assert len(set(rows)) == 3000
    np.testing.assert_array_equal(rows, _thinned(10_000, 0, "medi"))
    assert set(rows) != set(_thinned(10_000, 0, "cls"))
    np.testing.assert_array_equal(_thinned(3000, 0, "medi"), np.arange(3000))


def test_what_there_are_too_few_patients_for_is_said_beforehand(world: World, tmp_path: Path) -> None:
    assert thin_support(open_study(world.settings("plenty"))) == []
    folder = tmp_path / "few"
    shutil.copytree(world.real, folder)
    table = pd.read_parquet(folder / "index.parquet")
    stripes = (table["split_main"] == "test") & (table["class"] == "stripes") & (table["site"] == "south")
    keep = sorted(set(table.loc[stripes, "patient"]))[:4]
    table.loc[stripes & ~table["patient"].isin(keep), "split_main"] = ""
    put_index(folder, table)
    study = open_study(world.settings("few-out", real=str(folder)))
    assert thin_support(study) == [
        "Accuracy under shift has no interval: of the test patients at south only 4 of stripes (10 are needed).",
        "stripes × south has no distance: 16 patches of test patients, 20 are needed.",
        "The distance of south × frozen has no interval: 9 test patients, 10 are needed.",
    ]
    assert len(thin_support(study, downstream=False)) == 2
    table.loc[stripes & table["patient"].isin(keep), "split_main"] = "probe"
    table.loc[table.index[stripes][-20:], "split_main"] = "test"  # of five patients
    put_index(folder, table)
    told = thin_support(open_study(world.settings("few-out", real=str(folder))), downstream=False)
    assert told == [
        "The distance of stripes × south has no interval: 5 test patients, 10 are needed.",
        "The distance of south × frozen has no interval: 9 test patients, 10 are needed.",
    ]


def many_patches(patients: int) -> tuple[Study, Features, Comparison]:
    """A cell of more patches than a kernel takes: the reference, and a tenth of all patients as other real ones."""
    rng = np.random.default_rng(0)
    each = 60
    total = patients * each
    names = np.repeat([f"p{i:03d}" for i in range(patients)], each)
    real = 0.3 * rng.normal(size=(patients, 4))[np.repeat(np.arange(patients), each)] + rng.normal(size=(total, 4))
    reference, probe = np.arange(total * 9 // 10), np.arange(total * 9 // 10, total)
    study = SimpleNamespace(
        patients=names,
        index=pd.DataFrame({"class": ["a"] * total, "site": ["x"] * total}),
        class_field="class",
        site_field="site",
        reference=reference,
        probe=probe,
        train=reference,
        synthetic=dict.fromkeys(("cls", "medi"), SimpleNamespace(fields=(), index=pd.DataFrame(index=range(300)))),
        roles=synthetic_roles(["cls", "medi"]),
    )
    samples = {name: rng.normal(size=(300, 4)) + shift for name, shift in (("medi", 0.5), ("cls", 1.5))}
    rows = {"cls": np.arange(300), "medi": np.arange(300), "real": probe}
    comparison = Comparison({"class": "a"}, reference, rows, dict.fromkeys(rows, 0.0))
    return cast(Study, study), Features(real, samples, pca_basis(real)), comparison


def test_kernel_distances_of_many_patches_have_intervals() -> None:
    study, features, cell = many_patches(120)
    assert len(cell.reference) > 3000
    table = distance_table(study, features, [cell], 0)
    summary = encode(table.means) | {"ratio": encode(table.ratio)}
    whole = kid(features.real[cell.reference], features.synthetic["cls"], study.patients[cell.reference])
    low, high = summary["cls"]["interval"]
    assert low < summary["cls"]["value"] < high
    assert summary["cls"]["value"] == pytest.approx(whole, rel=0.1)
    assert isinstance(summary["ratio"]["interval"], list)


def test_few_other_patients_leave_the_check_without_an_interval() -> None:
    study, features, cell = many_patches(60)
    assert len(set(study.patients[study.probe])) == 6
    table = distance_table(study, features, [cell], 0)
    summary = encode(table.means) | {"ratio": encode(table.ratio)}
    assert summary["real"]["n_patients"] == 6
    assert summary["real"]["interval"] == "not estimable"
    assert summary["ratio"]["n_patients"] == 54  # the ratio does not rest on them
    assert isinstance(summary["cls"]["interval"], list)
    assert isinstance(summary["ratio"]["interval"], list)


def test_a_baseline_as_near_as_real_patients_gives_no_ratio() -> None:
    study, features, cell = many_patches(120)
    rng = np.random.default_rng(0)
    features.synthetic["cls"] = np.sqrt(1.09) * rng.normal(size=(300, 4))  # type: ignore[index]
    table = distance_table(study, features, [cell], 0)
    assert table.ratio.value is None
    assert table.ratio.reason == "the baseline may be as near as real patients are"


def test_two_reference_patients_are_too_few_for_a_ratio() -> None:
    """Without one of them no pair of patients is left, however far the baseline is."""
    study, features, cell = many_patches(20)
    cell.reference = cell.reference[:120]
    assert len(set(study.patients[cell.reference])) == 2
    ratio = distance_table(study, features, [cell], 0).ratio
    assert ratio.value is None
    assert ratio.reason == "too few patients"


def test_a_sample_is_itself_in_every_combination() -> None:
    """Two combinations share a third of their samples, at other positions: only these count in both."""
    study, features, cell = many_patches(120)
    parts = [np.arange(200), np.arange(100, 300)]
    reference = kernel_set(study, features, "", cell.reference, 0)
    found = mean_distance([kernel_distance(reference, kernel_set(study, features, "medi", r, 0)) for r in parts])
    assert list(found.sample.units) == list(range(300))
    x, real = features.synthetic["medi"], features.real[cell.reference[reference_rows(cell)]]
    who = study.patients[cell.reference[reference_rows(cell)]]
    for row in (7, 150, 299):
        each = [kid(real, x[part[part != row]], who) for part in parts]
        assert found.sample.values[row] == pytest.approx(np.mean(each))


def reference_rows(cell: Comparison) -> np.ndarray:
    """Those of the reference's rows that a kernel takes."""
    return _thinned(len(cell.reference), 0, "")


def test_a_set_does_not_change_the_dimensions_of_the_others() -> None:
    """A combination of few patches that a further set alone has."""
    study, features, large = many_patches(120)
    rows = {"cls": np.arange(300), "medi": np.arange(300)}
    large = Comparison({"class": "a"}, large.reference, rows, dict.fromkeys(rows, 0.0))
    few = large.reference[::480]
    assert len(few) < 16  # enough for three dimensions
    none = Comparison({"class": "b"}, few)
    alone = Comparison({"class": "b"}, few, {"medi": np.arange(40)}, {"medi": 0.0})
    skipped = Comparison({"class": "c"}, few[:4], skipped={"": "4 reference patches, fewer than 20"})
    found = [distance_table(study, features, [large, small, skipped], 0) for small in (none, alone)]
    assert found[0].pca_dims == found[1].pca_dims == 3
    assert found[0].combinations[0] == found[1].combinations[0]


def test_a_frechet_ratio_stands_beside_that_of_a_perfect_generator() -> None:
    """A generator that draws from the real population gets, on average, what the simulation says: less than 0."""
    rng = np.random.default_rng(0)
    found, perfect = [], []
    for seed in range(20):
        names = np.repeat([f"p{i:02d}" for i in range(40)], 10)
        who = np.repeat(np.arange(40), 10)
        real = 0.7 * rng.normal(size=(40, 6))[who] + 0.7 * rng.normal(size=(400, 6))
        reference, probe = np.arange(200), np.arange(200, 400)
        study = SimpleNamespace(
            patients=names,
            index=pd.DataFrame({"class": ["a"] * 400, "site": ["x"] * 400}),
            class_field="class",
            site_field="site",
            train=np.zeros(0, int),
            synthetic=dict.fromkeys(("cls", "medi")),
            roles=synthetic_roles(["cls", "medi"]),
        )
        made = {"medi": 0.98**0.5 * rng.normal(size=(200, 6)), "cls": rng.normal(size=(200, 6)) + 1.0}
        rows = {"medi": np.arange(200), "cls": np.arange(200), "real": probe}
        cell = Comparison({"class": "a"}, reference, rows, dict.fromkeys(rows, 0.0))
        record = frechet_ratio(cast(Study, study), Features(real, made, pca_basis(real)), [cell], 6, seed)
        assert record.value is not None
        assert record.perfect is not None
        assert (record.n, record.dims, record.n_combinations) == (200, 6, 1)
        found.append(record.value)
        perfect.append(record.perfect)
    error = np.std(found) / np.sqrt(20)
    assert np.mean(found) < -3 * error
    assert np.mean(perfect) == pytest.approx(np.mean(found), abs=3 * error)


def test_a_mean_over_cells_is_as_sure_as_its_smallest_cell() -> None:
    """A cell of few patients has the weight of any other in the mean."""
    study, features, large = many_patches(120)
    arms = {n: r for n, r in large.rows.items() if n != "real"}
    small = Comparison({"class": "b"}, large.reference[: 9 * 60], arms, dict.fromkeys(arms, 0.0))
    large = Comparison({"class": "a"}, large.reference, arms, dict.fromkeys(arms, 0.0))
    for cells, known in (([large], True), ([large, small], False)):
        mean = distance_table(study, features, cells, 0).means["medi"]
        assert mean.smallest_group == (108 if known else 9)
        assert mean.n_patients == 108  # the nine of the small one are among them
        assert isinstance(mean.interval, tuple) is known


def test_distances_in_different_cells_are_not_divided() -> None:
    study, features, cell = many_patches(120)
    parts = []
    for name, sources in (("a", ["medi", "real"]), ("b", ["cls", "real"])):
        rows = {source: cell.rows[source] for source in sources}
        parts.append(Comparison({"class": name}, cell.reference, rows, dict.fromkeys(rows, 0.0)))
    table = distance_table(study, features, parts, 0)
    assert table.ratio.value is table.frechet_ratio.value is None
    assert table.ratio.reason
    assert table.means["medi"].value is not None


def test_a_kernel_distance_is_that_of_the_features_as_they_are() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 8)) + 3.0, rng.normal(size=(60, 8)) + 3.5
    basis = pca_basis(a)
    found = measures_of(*(Patches(x, projected=basis.project(x, 4)) for x in (a, b)))
    assert found["kid"] == pytest.approx(kid(a, b))  # its kernel is no function of differences alone
    assert found["fd_pca"] == pytest.approx(frechet_distance(basis.project(a, 4), basis.project(b, 4)))
    assert "fd" not in found


def test_many_real_patches_are_thinned_before_they_are_dealt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(world.settings("thin"))
    rng = np.random.default_rng(0)
    real = rng.normal(size=(len(study.index), 6))
    arms = {name: rng.normal(size=(len(arm.rows), 6)) for name, arm in study.synthetic.items()}
    seen: list[int] = []

    def noted(a: Patches, b: Patches, seed: int) -> dict[str, float]:
        seen.extend([len(a.features), len(b.features)])
        return {"kid": 0.0}

    monkeypatch.setattr(real_split_range, "_MOST", 90)
    monkeypatch.setattr(real_split_range, "measures_of", noted)
    record = real_split_range.real_split_range(study, Features(real, arms, pca_basis(real)), 20, 0)
    assert record.n == record.n_reference == 90
    assert max(seen) == 90
