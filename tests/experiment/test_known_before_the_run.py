"""What an experiment knows of a dataset and of a split that it is yet to make, against what it then makes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from evaluation_world import CLASS_SCHEMA, render
from hub_tars import PROJECTS
from parts import make_cohort, put_index
from PIL import Image

from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.core.files import write_json
from latent_medi.experiment.cost import experiment_cost
from latent_medi.experiment.dry_run import dry_run
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds import declare
from latent_medi.experiment.kinds.datasets import ensure_split, make_plans
from latent_medi.experiment.settings import CorpusSettings, ExperimentModel, ExperimentSettings
from latent_medi.experiment.what_is_known import known_data, planned_images
from latent_medi.metadata.settings import SplitSettings
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.settings import JoinSettings
from latent_medi.shards.split import split_folder
from latent_medi.shards.writing.join import join
from latent_medi.shards.writing.writer import Patch, write_dataset

TO_SAMPLE = ["shards", "audit", "encode", "train", "plan", "sample"]


def open_experiment(settings: ExperimentSettings) -> Experiment:
    """The experiment with its stages, as far as its folder has come."""
    experiment = Experiment(settings)
    declare(experiment)
    return experiment


@pytest.fixture(scope="module")
def lungs(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Hub's tars with all slides of two cancer types, two patches of noise of each."""
    table = shared / "data" / "tcga_metadata" / "all_slide_metadata.csv"
    if not table.is_file():
        pytest.skip(f"{table} is absent")
    labels = {project: label for label, project in PROJECTS.items() if label.startswith("Lung")}
    slides = pd.read_csv(table, dtype=str, keep_default_na=False)
    folder = tmp_path_factory.mktemp("hub")
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "dataset_internal_train_part000.tar", "w") as tar:
        for slide, project in slides[["slide_submitter_id", "project_id"]].itertuples(index=False):
            if project not in labels:
                continue
            for number in range(2):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(picture, "JPEG")
                sample = {"jpg": picture.getvalue(), "json": json.dumps({"label": labels[project]}).encode()}
                for ending, content in sample.items():
                    info = tarfile.TarInfo(f"{slide}/0_{number}_512.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def beyond(source: Path, tables: Path, out: Path, **changes: Any) -> ExperimentSettings:
    """``tcga_ut/beyond`` up to its samples, on patches of 16 px."""
    own = {
        "source": str(source),
        "metadata": str(tables / "all_slide_metadata.csv"),
        "codes": str(tables / "tissueSourceSite.tsv"),
        "out": str(out),
        "patch_size": 16,
        "stages": TO_SAMPLE,
        "autoencoder": "taesd",
        "processes": 1,
    }
    values = config.load(ExperimentSettings, Path("tcga_ut/beyond"))
    return config.make(ExperimentSettings, config.merge(config.merge(values, own), changes), "tcga_ut/beyond")


def test_a_split_that_the_run_makes_is_known_from_the_list_of_patches(
    lungs: Path, shared: Path, tmp_path: Path
) -> None:
    settings = beyond(lungs, shared / "data" / "tcga_metadata", tmp_path / "out")
    e = open_experiment(settings)
    told = known_data(e)
    assert told is not None
    images = planned_images(e, None, told)
    assert not (tmp_path / "out").exists()
    e.stages.run("shards")
    ensure_split(e)
    made = open_experiment(settings)
    index = PatchDataset.open(e.data).index
    assert parts_of(told.index, "beyond") == parts_of(index, "beyond")
    assert told.training_patches == int((index["split_beyond"] == "train").sum())
    assert made.held_out, "a combination that can be evaluated, or nothing is shown"
    assert images == {name: int(plan["count"].sum()) for name, plan in make_plans(made).items()}


def parts_of(index: pd.DataFrame, split: str) -> dict[str, str]:
    """Part of each patch by its key."""
    return index.set_index("key")[f"split_{split}"].to_dict()


def test_a_split_and_a_filter_of_a_folder_are_known_before_the_run_applies_them(tmp_path: Path) -> None:
    folder = make_cohort(tmp_path / "data", ("aster", "birch", "cedar"), patches=120).folder
    settings = ExperimentSettings(
        data=str(folder),
        out=str(tmp_path / "out"),
        stages=TO_SAMPLE,
        split="some",
        split_settings={"fractions": {"train": 0.5, "test": 0.5}},
        only={"site": ["aster", "birch"]},
    )
    e = open_experiment(settings)
    told = known_data(e)
    assert told is not None
    images, rows = planned_images(e, None, told), {row.stage: row for row in experiment_cost(e).stages}
    assert "some" not in PatchDataset.open(folder).splits
    ensure_split(e)
    index = PatchDataset.open(folder).index
    assert parts_of(told.index, "some") == parts_of(index, "some")
    assert told.training_patches == int((index["split_some"] == "train").sum())
    assert images == {name: int(plan["count"].sum()) for name, plan in make_plans(open_experiment(settings)).items()}
    assert rows["encode"].images == int((index["site"] != "cedar").sum()) < len(index)


def test_a_split_that_cannot_be_made_is_refused_before_anything_is_read(
    lungs: Path, shared: Path, tmp_path: Path
) -> None:
    tables = shared / "data" / "tcga_metadata"
    wrong = beyond(lungs, tables, tmp_path / "out", split_settings={"hold_out_fields": ["class", "hospital"]})
    with pytest.raises(UserError, match="hospital"):
        dry_run(wrong)


def test_what_a_model_saw_is_planned_although_a_field_is_not(tmp_path: Path) -> None:
    """A field that is not planned tells no combination apart: they are as seen as without it."""
    folder = make_cohort(tmp_path / "data", ("aster", "birch")).folder
    put_index(folder, PatchDataset.open(folder).index.assign(age=float("nan")))
    settings = ExperimentSettings(
        data=str(folder), plan_fields=["class"], seen_per_cell=3, unseen_per_cell=50, plan_unseen="held_out"
    )
    plan = make_plans(Experiment(settings))["medi"]
    assert plan[["class", "site", "count"]].to_numpy().tolist() == [["benign", "", 3], ["tumour", "", 3]]


def images_of_classes(folder: Path, seed: int) -> Path:
    """A dataset folder of images that name neither patient nor hospital."""
    draw = np.random.default_rng(seed)
    names = [f"{folder.name}-{kind}-{number}" for kind in ("blobs", "rings", "stripes") for number in range(8)]
    images = [
        Patch(name, render(kind, "east", "formalin", draw), name, name, 0, 0, 0.5, {"class": kind}, "real")
        for name in names
        for kind in [name.split("-")[1]]
    ]
    write_dataset(folder, images, folder.name, CLASS_SCHEMA, 32, 0.5)
    return folder


def test_what_a_split_holds_out_is_known_without_a_site(tmp_path: Path) -> None:
    settings = ExperimentSettings(
        data=str(images_of_classes(tmp_path / "data", 0)),
        out=str(tmp_path / "out"),
        stages=TO_SAMPLE,
        split="some",
        split_settings={"fractions": {"train": 0.5, "test": 0.5}},
        site_field="",
        held_out="split",
        plan_fields=["class"],
        seen_per_cell=5,
    )
    e = open_experiment(settings)
    assert planned_images(e, None, known_data(e)) == {"medi": 15, "cls": 15}


def test_an_absent_corpus_does_not_make_what_was_trained_on_it_another(tmp_path: Path) -> None:
    """After a kill while it is made again, or to free the disk: what it is made from decides, once it is there."""
    data, other = (images_of_classes(tmp_path / name, seed) for seed, name in enumerate(["data", "other"]))
    split_folder(SplitSettings(str(data), "main", fractions={"train": 0.5, "test": 0.5}, site_field=""))
    settings = ExperimentSettings(
        data=str(data),
        out=str(tmp_path / "out"),
        stages=["shards", "corpus", "encode", "train"],
        site_field="",
        corpus={"other": CorpusSettings(data=str(other))},
        models={"pre": ExperimentModel("demo/cls", data="corpus")},
    )
    corpus = tmp_path / "out" / "corpus"
    join(JoinSettings(str(corpus), [str(other)], without=[str(data)]))
    whole = open_experiment(settings)
    for name in settings.stages:
        made = {"made_from": whole.stages._made_from(name), "models": ["", "pre"], "seconds": 1.0}
        write_json(tmp_path / "out" / "stages" / f"{name}.json", made)
    for name in ("latents", "latents-pre", "pre"):
        (tmp_path / "out" / name).mkdir()
    whole.check_stages()
    (corpus / "dataset.json").unlink()
    open_experiment(settings).check_stages()
    settings.corpus["other"].part = "train"
    settings.corpus["other"].data = ""
    with pytest.raises(UserError, match=r"corpus was made from other inputs: corpus\.other"):
        open_experiment(settings).check_stages()
