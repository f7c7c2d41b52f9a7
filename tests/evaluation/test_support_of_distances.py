"""Distances have the floor, the mix, the patients and the interval that they say they have."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from evaluation_world import SCHEMA, SIZE, World, synthetic_patches

from latent_medi.evaluation import against_real, fidelity
from latent_medi.evaluation.against_real import Patches, measures_of
from latent_medi.evaluation.fidelity import Cell, Features, _mean_of_known, class_cells, ratio, summarise
from latent_medi.evaluation.study import Study, open_study
from latent_medi.features.statistics import frechet_distance, kid, pca_basis
from latent_medi.shards.writer import write_dataset


def test_a_side_of_another_mix_is_listed_and_not_judged(world: World) -> None:
    """Test patients of a hospital that no other real patient and no sample comes from: no distance is a floor's."""
    folder = world.root / "external"
    shutil.copytree(world.real, folder)
    table = pd.read_parquet(folder / "index.parquet")
    test = table["split_main"] == "test"
    table.loc[~test & (table["site"] == "east"), "site"] = "north"
    table.loc[test & (table["site"] == "north"), "site"] = "east"  # samples are of the north alone: nothing is shared
    table.to_parquet(folder / "index.parquet")
    made = world.root / "external-medi"
    patches = [p for p in synthetic_patches(40, None, False) if p.fields["site"] == "north"]
    write_dataset(made, patches, "medi", SCHEMA, SIZE, 0.5)
    arms = {"medi": str(made), "cls": str(world.cls)}
    study = open_study(world.settings("external-out", real=str(folder), synthetic=arms))
    for cell in class_cells(study, 0):
        assert set(cell.rows) == {"cls"}  # what an arm was not told is not held against it
        assert "other real patients have nothing like" in cell.skipped["floor"]
        assert "its samples have nothing like" in cell.skipped["medi"]


def many_patches(patients: int) -> tuple[Study, Features, Cell]:
    """A cell of more patches than a kernel takes: reference, and the floor of a tenth of all patients."""
    rng = np.random.default_rng(0)
    each = 60
    total = patients * each
    names = np.repeat([f"p{i:03d}" for i in range(patients)], each)
    real = 0.3 * rng.normal(size=(patients, 4))[np.repeat(np.arange(patients), each)] + rng.normal(size=(total, 4))
    reference, probe = np.arange(total * 9 // 10), np.arange(total * 9 // 10, total)
    study = SimpleNamespace(
        patients=names, index=names, reference=reference, probe=probe, arms={"cls": None, "medi": None}
    )
    samples = {name: rng.normal(size=(300, 4)) + shift for name, shift in (("medi", 0.5), ("cls", 1.5))}
    rows = {"cls": np.arange(300), "medi": np.arange(300), "floor": probe}
    return cast(Study, study), Features(real, samples, pca_basis(real)), Cell(
        {"class": "a"}, reference, rows, dict.fromkeys(rows, 0.0)
    )  # fmt: skip


def test_kernel_distances_of_many_patches_have_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    study, features, cell = many_patches(120)
    assert len(cell.reference) > 3000
    monkeypatch.setattr(fidelity, "full_rank", lambda n, d: False)
    summary = summarise(study, features, [cell], 100, 0)["summary"]
    whole = kid(features.real[cell.reference], features.arms["cls"], subsets=0)[0]
    low, high = summary["cls"]["interval"]
    assert low < summary["cls"]["value"] < high
    assert summary["cls"]["value"] == pytest.approx(whole, rel=0.1)
    assert isinstance(summary["ratio"]["interval"], list)


def test_a_floor_of_few_patients_has_no_interval_anywhere() -> None:
    study, features, cell = many_patches(60)
    assert len(set(study.patients[study.probe])) == 6
    summary = summarise(study, features, [cell], 100, 0)["summary"]
    assert summary["floor"]["n_patients"] == summary["ratio"]["n_patients"] == 6
    assert summary["floor"]["interval"] == summary["ratio"]["interval"] == "not estimable"
    assert isinstance(summary["cls"]["interval"], list)


def test_only_large_frechet_distances_take_fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    study, features, cell = many_patches(120)
    wide = Features(np.tile(features.real, 40), {n: np.tile(x, 40) for n, x in features.arms.items()}, features.basis)

    def quick(*arguments: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        numbers = {"value": 1.0, "fd": None, "kid": 1.0, "fd_pca": 1.0}
        draws = np.ones(len(arguments[5].resamples.weights))
        return {"arms": dict.fromkeys(cell.rows, numbers)}, dict.fromkeys(cell.rows, draws)

    monkeypatch.setattr(fidelity, "_judge", quick)
    for enough, expected in ((True, 50), (False, 200)):
        monkeypatch.setattr(fidelity, "full_rank", lambda n, d, enough=enough: enough)
        assert summarise(study, wide, [cell], 200, 0)["resamples"] == expected


def test_the_ratio_is_as_unsure_as_its_distances() -> None:
    """Resampling raises the floor's draws twice as much as an arm's, which is undone before they are divided."""
    rng = np.random.default_rng(0)
    value = {"medi": 4.0, "cls": 6.0, "floor": 3.0}
    raised = {"medi": 1.2, "cls": 1.2, "floor": 2.4}
    draws = {name: value[name] + raised[name] + 0.2 * rng.normal(size=400) for name in value}
    summary = {name: {"value": v, "n_patches": 100} for name, v in value.items()}
    record = ratio(summary, draws, 40)
    # By the rule for a quotient's error: σ² = (σ_m² + r²·σ_c² + (1 − r)²·σ_f²) / gap² = 0.0831².
    spread = 0.2 / 3 * np.sqrt(1 + (1 / 3) ** 2 + (2 / 3) ** 2)
    assert record["value"] == pytest.approx(1 / 3)
    assert record["interval"] == pytest.approx([1 / 3 - 1.96 * spread, 1 / 3 + 1.96 * spread], abs=0.04)
    wild = draws | {"cls": 6.0 + 2.0 * rng.normal(size=400)}  # class alone may be no worse than real patients
    assert ratio(summary, wild, 40)["interval"] == "not estimable"


def test_a_resample_without_a_cell_s_patients_keeps_the_other_cells() -> None:
    draws = [np.array([1.0, np.nan, np.nan]), np.array([3.0, 5.0, np.nan])]
    np.testing.assert_array_equal(_mean_of_known(draws), [2.0, 5.0, np.nan])


def test_a_kernel_distance_is_that_of_the_features_as_they_are() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 8)) + 3.0, rng.normal(size=(60, 8)) + 3.5
    basis = pca_basis(a)
    found = measures_of(*(Patches(x, projected=basis.project(x, 4)) for x in (a, b)))
    assert found["kid"] == pytest.approx(kid(a, b, subsets=0)[0])  # its kernel is no function of differences alone
    assert found["fd_pca"] == pytest.approx(frechet_distance(basis.project(a, 4), basis.project(b, 4)))
    assert "fd" not in found


def test_many_real_patches_are_thinned_before_they_are_dealt(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(world.settings("thin"))
    rng = np.random.default_rng(0)
    real = rng.normal(size=(len(study.index), 6))
    arms = {name: rng.normal(size=(len(arm.rows), 6)) for name, arm in study.arms.items()}
    seen: list[int] = []

    def noted(a: Patches, b: Patches, seed: int) -> dict[str, float]:
        seen.extend([len(a.features), len(b.features)])
        return {"kid": 0.0}

    monkeypatch.setattr(against_real, "_MOST", 90)
    monkeypatch.setattr(against_real, "measures_of", noted)
    record = against_real.against_real(study, Features(real, arms, pca_basis(real)), 20, 0)
    assert record["n"] == record["n_reference"] == 90
    assert max(seen) == 90
