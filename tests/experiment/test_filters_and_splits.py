"""What an experiment does with a row filter, with a split that it makes itself, and with the split's combinations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parts import make_cohort, put_index

from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds.datasets import ensure_split, make_plans
from latent_medi.experiment.run import run
from latent_medi.experiment.settings import OPTIONAL_STAGES, STAGES, ExperimentSettings
from latent_medi.experiment.stages import Stages
from latent_medi.metadata.settings import SplitSettings
from latent_medi.metadata.split_schemes import make_split
from latent_medi.metadata.table_index import map_sites, read_table_index
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.split import split_of

EVERY = [name for name in STAGES if name not in OPTIONAL_STAGES or name == "select"]


def made_from(settings: ExperimentSettings, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The inputs of every stage, as a run finds them before anything is done."""
    found: dict[str, Any] = {}

    def noted(stages: Stages) -> None:
        found.update({name: stages._made_from(name) for name in stages._stages})
        raise InterruptedError

    with monkeypatch.context() as patched:
        patched.setattr(Stages, "check", noted)
        with pytest.raises(InterruptedError):
            run(settings)
    return found


def test_a_filter_reaches_every_command_and_belongs_to_every_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cohort(tmp_path / "data", ("aster", "birch"))
    other = make_cohort(tmp_path / "other", ("aster", "birch"), seed=1)
    settings = ExperimentSettings(out=str(tmp_path / "out"), data=str(tmp_path / "data"), stages=EVERY)
    settings.models["medi"].data = str(other.folder)
    before = made_from(settings, monkeypatch)
    # As earlier versions noted it.
    later = ("'only'", "'projection'", "'references'", "'pools'", "'tasks'")
    assert not [name for name in later if name in str(before)]
    settings.only = {"site": ["aster"]}
    after = made_from(settings, monkeypatch)
    assert {name for name in before if after[name] == before[name]} == {"shards"}
    e = Experiment(settings)
    assert e.encodings[""].only == e.evaluation.only == e.selection("cls").only == settings.only
    assert (e.models["cls"].training or {})["only"] == settings.only
    # A dataset of its own has other fields: the filter is of the experiment's.
    assert "only" not in (e.models["medi"].training or {})
    assert e.encodings["medi"].only == {}
    settings.only = {"site": ["birch"]}
    assert all(found != after[name] for name, found in made_from(settings, monkeypatch).items() if name != "shards")


def test_the_plan_is_of_what_the_filter_leaves(tmp_path: Path) -> None:
    make_cohort(tmp_path / "data", ("aster", "birch", "cedar"))
    settings = ExperimentSettings(data=str(tmp_path / "data"), only={"site": ["aster", "cedar"]})
    plans = make_plans(Experiment(settings))
    assert len(plans["cls"]) == 2
    assert len(plans["medi"]) == 4
    assert set(plans["medi"]["site"]) == {"aster", "cedar"}
    with pytest.raises(UserError, match="closest: 'cedar'"):
        make_plans(Experiment(ExperimentSettings(data=str(tmp_path / "data"), only={"site": ["ceder"]})))


def held(settings: ExperimentSettings) -> list[tuple[str, ...]]:
    return [tuple(combination.values()) for combination in Experiment(settings).held_out]


def test_a_run_makes_its_split_once_and_evaluates_what_that_holds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    dataset = make_cohort(folder, ("aster", "birch", "cedar"), patches=480)
    patients = [f"p{i // 2:03d}" for i in range(len(dataset))]  # two patches each, of one class and site
    index = dataset.index.assign(patient=patients, slide=patients, **{"class": ["ab"[i // 2 % 2] for i in range(480)]})
    index["class"] = index["class"].map({"a": "benign", "b": "tumour"})
    index["site"] = [("aster", "birch", "cedar")[i // 4 % 3] for i in range(480)]
    put_index(folder, index)
    settings = ExperimentSettings(
        out=str(tmp_path / "out"),
        data=str(folder),
        split="drawn",
        split_settings={
            "hold_out_fields": ["class", "site"],
            "hold_out_share": 0.2,
            "fractions": {"train": 0.8, "test": 0.2},
            "hold_out_fractions": {"probe": 0.5, "test": 0.5},
        },
        held_out="split",
    )
    first = made_from(settings, monkeypatch)
    made = PatchDataset.open(folder)
    (combination,) = made.info["splits"]["drawn"]["recipe"]["held_out"]
    wanted = SplitSettings(seed=0, **settings.split_settings)
    assert split_of(made, wanted).column.tolist() == made.index["split_drawn"].tolist()
    assert first["audit"]["audit"]["split"]["sha256"]  # of the column: the split was made before
    assert held(settings) == [tuple(combination.values())]
    # Repeated, nothing is written; other settings are no reason to replace what models were trained on.
    written = (folder / "index.parquet").stat().st_mtime_ns
    assert made_from(settings, monkeypatch) == first
    assert (folder / "index.parquet").stat().st_mtime_ns == written
    settings.split_settings["hold_out_share"] = 0.4
    with pytest.raises(UserError, match="has another split 'drawn' than split_settings would make"):
        run(settings)
    assert PatchDataset.open(folder).info["splits"] == made.info["splits"]


def test_a_split_that_a_run_makes_is_of_the_rows_that_it_keeps(tmp_path: Path) -> None:
    make_cohort(tmp_path / "data", ("aster", "birch", "cedar"), patches=120)
    settings = ExperimentSettings(
        data=str(tmp_path / "data"),
        split="some",
        split_settings={"fractions": {"train": 0.5, "test": 0.5}},
        only={"site": ["aster", "birch"]},
    )
    ensure_split(Experiment(settings))
    index = PatchDataset.open(tmp_path / "data").index
    assert set(index["split_some"][index["site"] == "cedar"]) == {""}
    assert set(index["split_some"][index["site"] != "cedar"]) == {"train", "test"}


def test_a_run_that_is_refused_leaves_the_dataset_without_its_split(tmp_path: Path) -> None:
    folder = make_cohort(tmp_path / "data", ("aster", "birch", "cedar"), patches=120).folder
    dataset = PatchDataset.open(folder)
    dataset.add_split("other", dataset.index["split_main"].tolist(), {})  # as this version writes it
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    values: dict[str, Any] = {"data": str(folder), "out": str(tmp_path / "out"), "split": "drawn", "stages": EVERY[:5]}
    values |= {"split_settings": {"fractions": {"train": 0.5, "test": 0.5}}}
    settings = config.make(ExperimentSettings, values | {"generate": {"guidance": {"scales": {"sight": 2.0}}}}, "")
    with pytest.raises(UserError, match="'sight', no field of the dataset"):
        run(settings)
    assert {path.name: path.read_bytes() for path in folder.glob("*.*")} == before


def test_the_packaged_experiment_holds_out_what_it_says(shared: Path) -> None:
    """The numbers in the header of tcga_ut/beyond, of MeDi's slides at GDC's institutions."""
    values = config.load(ExperimentSettings, "tcga_ut/beyond") | {"source": "tars"}
    settings = config.make(ExperimentSettings, values, "tcga_ut/beyond")
    assert Experiment(settings).models["medi"].fields == ["class", "site", "gender", "race", "age"]
    folder = shared / "data" / "tcga_metadata"
    index, schema = read_table_index(folder / "all_slide_metadata.csv", "project_id", "tissue_source_site")
    index, _, _ = map_sites(index, schema, "tissue_source_site", folder / "tissueSourceSite.tsv")
    index = index.rename(columns={"project_id": "class", "tissue_source_site": "site"})
    split = make_split(index, config.make(SplitSettings, settings.split_settings, "split_settings"))
    held_out = split.recipe["held_out"]
    assert len(held_out) == 93
    patients = index[split.column == "test"].groupby(["class", "site"])["patient"].nunique()
    assert 20 <= sum(patients.get((c["class"], c["site"]), 0) >= 10 for c in held_out) <= 30


def test_held_out_combinations_alone_are_planned_beside_seen_ones(tmp_path: Path) -> None:
    dataset = make_cohort(tmp_path / "data", ("aster", "birch", "cedar", "dahlia"), patches=480)
    gone = [("tumour", "aster"), ("benign", "dahlia")]
    part = [
        "test" if pair in gone else "train" for pair in zip(dataset.index["class"], dataset.index["site"], strict=True)
    ]
    patients = dataset.index["patient"] + dataset.index["class"] + dataset.index["site"]
    put_index(dataset.folder, dataset.index.assign(patient=patients))
    PatchDataset.open(dataset.folder).add_split("two", part, {})
    values: dict[str, Any] = {"data": str(dataset.folder), "split": "two", "seen_per_cell": 2, "unseen_per_cell": 7}
    values["held_out"] = [{"class": "tumour", "site": "aster"}]
    counts = {}
    for which in ("all", "held_out"):
        plan = make_plans(Experiment(ExperimentSettings(plan_unseen=which, **values)))["medi"]
        counts[which] = {(row["class"], row["site"]): row["count"] for row in plan.to_dict("records")}
    assert sorted(counts["all"].values()) == [2] * 6 + [7] * 2
    assert counts["held_out"] == {pair: n for pair, n in counts["all"].items() if pair != gone[1]}
