"""Held-out combinations that are taken from the split, and evaluations of some rows."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from evaluation_world import HELD_OUT, SCHEMA, SIZE, Size, World, evaluated, filters, real_patches, write_real
from parts import put_index, random_images

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.evaluation.cohort.held_out import not_evaluated_text
from latent_medi.evaluation.cohort.open_study import open_study
from latent_medi.evaluation.results import read_metrics
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.training_record import training_record
from latent_medi.report.render import render_report
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.writing.writer import Patch, write_dataset


def with_recipe(folder: Path, recipe: dict[str, object]) -> str:
    """The real patches of the planted cohort under a split with a recipe of its own."""
    patches = list(real_patches(Size()))
    split = {p.patient: p.patient.split("-")[0] for p in patches}
    write_dataset(folder, patches, "planted", SCHEMA, SIZE, 0.5, splits={"main": (split, recipe)})
    return str(folder)


def test_what_the_recipe_holds_out_is_evaluated_or_listed(world: World, tmp_path: Path) -> None:
    wanted = [*HELD_OUT, {"class": "rings", "site": "north"}, {"site": "nowhere"}, {"ward": "w"}]
    real = with_recipe(tmp_path / "real", {"kind": "planted", "held_out": wanted})
    study = open_study(world.settings("recipe", real=real, held_out="split"))
    assert study.held_out == HELD_OUT
    reasons = {tuple(each.combination.values()): each.reason for each in study.not_evaluated}
    assert set(reasons) == {("rings", "north"), ("nowhere",), ("w",)}
    assert "training patches have it" in reasons["rings", "north"]
    assert reasons["nowhere",] == "its site is not known"
    assert reasons["w",] == "ward is no class or categorical field"
    assert "2 of 5 combinations that the split holds out are evaluated" in "".join(study.warnings)


def test_without_a_recipe_it_is_what_training_lacks_of_class_and_site(world: World) -> None:
    study = open_study(world.settings("derived", held_out="split"))
    assert study.held_out == [{"class": "stripes", "site": "south"}]
    assert study.not_evaluated == []


def test_too_few_patients_are_listed_and_not_refused(world: World, tmp_path: Path) -> None:
    real = str(tmp_path / "few")
    write_real(tmp_path / "few", Size(test=9))
    settings = world.settings("few", real=real, held_out="split", downstream=False)
    (found,) = open_study(settings).not_evaluated
    assert found.reason == "9 test patients, 10 are needed"
    with pytest.raises(UserError, match=r"0 of 1 combinations .* stripes × south .9 test patients"):
        open_study(world.settings("few", real=real, held_out="split"))
    write_real(tmp_path / "single", Size(test=12, patches=1))
    study = open_study(world.settings("few", real=str(tmp_path / "single"), held_out="split", downstream=False))
    assert [each.reason for each in study.not_evaluated] == ["12 test patches, 20 are needed"]


def test_sites_that_training_never_saw_cannot_be_identified(tmp_path: Path) -> None:
    """As in MeDi's split: every test combination is of a new site."""
    rows = [
        {"patient": f"{part}-{tumour}-{i}", "class": tumour, "site": f"{tumour}-{part}", "part": part}
        for part in ("train", "test")
        for tumour in "ab"
        for i in range(12)
        for _ in range(2)
    ]
    table = pd.DataFrame(rows)
    images = random_images(len(table))
    patches = [
        Patch(f"k{i}", images[i], row["patient"], row["patient"], 0, 0, 0.5, {n: row[n] for n in ("class", "site")})
        for i, row in enumerate(rows)
    ]
    split = (dict(zip(table["patient"], table["part"], strict=True)), {"kind": "medi"})
    schema = Schema.from_table(table, "class", ["site"])
    write_dataset(tmp_path / "data", patches, "tss", schema, 32, 0.5, splits={"main": split})
    study = open_study(EvaluateSettings(real=str(tmp_path / "data"), held_out="split", downstream=False))
    assert study.held_out == []
    assert {each.reason for each in study.not_evaluated} == {
        "training cannot identify it: no patch has site = 'a-test'",
        "training cannot identify it: no patch has site = 'b-test'",
    }


def test_the_list_is_in_the_metrics_and_the_report(world: World, tmp_path: Path) -> None:
    wanted = [HELD_OUT[0], *({"site": f"ward {i}"} for i in range(9))]
    real = with_recipe(tmp_path / "real", {"kind": "planted", "held_out": wanted})
    found = evaluated(world.settings("listed", real=real, held_out="split"), [filters()])
    assert found["settings"]["held_out"] == "split"
    assert found["dataset"]["held_out"] == HELD_OUT[:1]
    assert len(found["dataset"]["not_evaluated"]) == 9
    metrics = read_metrics(world.root / "listed")
    sentence = not_evaluated_text(metrics.dataset.held_out, metrics.dataset.not_evaluated)
    assert sentence in metrics.warnings
    assert "and 4 more" in sentence
    page = render_report(metrics, tmp_path / "report.html", real=real).read_text()
    assert all(f"ward {i}" in page for i in range(9))  # all of them, not the first few


def test_an_evaluation_of_some_rows_is_that_of_a_folder_with_these_rows(world: World, tmp_path: Path) -> None:
    only = {"class": ["rings", "stripes"]}
    write_real(tmp_path / "small", Size(), classes=only["class"])
    options = {"held_out": HELD_OUT[:1], "downstream": False}
    ours = open_study(world.settings("some", only=only, **options))
    theirs = open_study(world.settings("some", real=str(tmp_path / "small"), **options))
    for part in ("train", "shown", "probe", "test"):
        mine, other = (s.index["key"].iloc[getattr(s, part)].tolist() for s in (ours, theirs))
        assert mine == other, part
    assert ours.classes == ["rings", "stripes"]
    assert set(ours.synthetic["medi"].index["class"]) == set(only["class"])
    # The class-only model knows no site: a filter on sites leaves its samples alone.
    sites = open_study(world.settings("sites", only={"site": ["south", "east"]}, **options))
    assert len(sites.synthetic["cls"].rows) == len(sites.synthetic["cls"].dataset)
    assert set(sites.synthetic["medi"].index["site"]) == {"south", "east"}
    # Samples have slides of their own names.
    slides = ours.index["slide"][ours.index["site"] != "north"].unique().tolist()
    of_slides = open_study(world.settings("slides", only={"slide": slides}, **options))
    assert len(of_slides.synthetic["medi"].rows) == len(of_slides.synthetic["medi"].dataset)
    with pytest.raises(UserError, match="closest: 'rings'"):
        open_study(world.settings("typo", only={"class": ["ring"]}, **options))
    found = evaluated(world.settings("counted", only=only, **options), [filters()])
    assert found["dataset"]["classes"] == only["class"]
    assert found["dataset"]["n_patches"] == len(PatchDataset.open(tmp_path / "small"))


def test_a_model_of_all_rows_may_be_evaluated_on_some(world: World, tmp_path: Path) -> None:
    """The patients that it was trained on are those of the split's part, with or without the filter."""
    real = PatchDataset.open(world.real)
    only = {"class": ["rings", "stripes"]}
    train = real.index[real.index["split_main"] == "train"]
    for number, rows in enumerate((train, train[train["class"].isin(only["class"])], train[train["site"] == "east"])):
        copied = tmp_path / f"medi{number}"
        made = PatchDataset.open(world.medi)
        _copy(made.folder, copied)
        info, _ = read_sealed(copied / "dataset.json", "")
        info["provenance"]["seen"] = training_record(rows, real.schema)
        write_sealed(copied / "dataset.json", {key: value for key, value in info.items() if key != "seal"})
        settings = world.settings("seen", synthetic={"medi": str(copied)}, only=only, held_out=HELD_OUT[:1])
        warned = [text for text in open_study(settings).warnings if "other patients" in text]
        assert bool(warned) == (number == 2)


def _copy(folder: Path, to: Path) -> None:
    to.mkdir()
    (to / "data").symlink_to(folder / "data")
    info, _ = read_sealed(folder / "dataset.json", "")
    write_sealed(to / "dataset.json", {key: value for key, value in info.items() if key != "seal"})
    put_index(to, PatchDataset.open(folder).index)
