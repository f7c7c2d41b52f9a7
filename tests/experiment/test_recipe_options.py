"""What an experiment hands to the recipe that makes its dataset."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from latent_medi.core.config import build, parse
from latent_medi.core.errors import UserError
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds import declare
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.recipes.registry import recipe_arguments
from latent_medi.shards.dataset import PatchDataset


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two patches as Zenodo has them, a clinical table and a table of site codes."""
    for slide in ("TCGA-NA-A4QV-01Z-00-DX1", "TCGA-E2-A14V-01Z-00-DX1"):
        path = tmp_path / "zenodo" / "Lung" / "0" / slide / "0_1_256.jpg"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (256, 256), (200, 100, 150)).save(path)
    table = "project_id,case_submitter_id,slide_submitter_id,gender,race,age_at_index\n"
    for case, gender, race, age in (("TCGA-NA-A4QV", "female", "asian", 72), ("TCGA-E2-A14V", "female", "white", 50)):
        table += f"TCGA-LUAD,{case},{case}-01Z-00-DX1,{gender},{race},{age}\n"
    (tmp_path / "clinical.csv").write_text(table)
    codes = "TSS Code\tSource Site\tStudy Name\tBCR\nNA\tDuke University\tU\tB\nE2\tRoswell Park\tB\tB\n"
    (tmp_path / "codes.tsv").write_text(codes)
    return tmp_path


def words(source: Path, *more: str) -> list[str]:
    """Words of ``latent-medi run`` that make the dataset alone."""
    tables = [f"metadata={source / 'clinical.csv'}", f"codes={source / 'codes.tsv'}"]
    where = ["recipe=tcga-ut", f"source={source / 'zenodo'}", f"out={source / 'out'}", "stages=[shards]"]
    return [*where, "patch_size=32", "processes=1", *tables, *more]


def test_tables_and_options_reach_the_recipe_and_belong_to_its_record(source: Path) -> None:
    settings = parse(ExperimentSettings, words(source, "recipe_options={codec: jpg}"), "run")
    experiment = Experiment(settings)
    declare(experiment)
    experiment.stages.run("shards")
    dataset = PatchDataset.open(experiment.data)
    assert dataset.info["codec"] == "jpg"
    fields = dataset.index.set_index("patient")[["site", "race", "age"]].T.to_dict("list")
    assert fields["TCGA-NA-A4QV"] == ["Duke University", "asian", 72.0]
    assert experiment.stages.finished("shards")
    table = source / "clinical.csv"
    table.write_text(table.read_text().replace("asian", "white"))
    declare(experiment)
    assert not experiment.stages.finished("shards")  # another table, another dataset


def test_options_are_of_the_kinds_that_the_recipe_takes(source: Path) -> None:
    given = {"mpp": "0.25", "codec": "webp", "allow_duplicates": ["a", "b"]}
    assert recipe_arguments("tcga-tiles", given) == {"mpp": 0.25, "codec": "webp", "allow_duplicates": ["a", "b"]}
    assert recipe_arguments("tcga-ut", {"metadata": str(source / "clinical.csv"), "scale": "0"}) == {
        "metadata": source / "clinical.csv",
        "scale": 0,
    }
    for options, message in (
        ({"mpp": "fine"}, "mpp of the recipe 'tcga-tiles' is 'fine', no number"),
        ({"mpp": ["1"]}, "mpp of the recipe 'tcga-tiles' is a list"),
        ({"codec": "jpeg"}, "codec of the recipe 'tcga-tiles' is 'jpeg'; closest: 'jpg'"),
        ({"seed": "1"}, "takes no seed"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            recipe_arguments("tcga-tiles", options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "prostate", "metadata": "clinical.csv"}, "The recipe 'prostate' takes no metadata"),
        ({"recipe": "demo", "codes": "codes.tsv"}, "The recipe 'demo' takes no codes"),
        ({"recipe": "tcga-ut", "recipe_options": {"schem": "external"}}, "takes no schem; closest: 'scheme'"),
        ({"recipe": "tcga-ut", "metadata": "nowhere.csv"}, "metadata of the recipe 'tcga-ut' is nowhere.csv, which"),
        ({"recipe": "tcga-ut", "codes": "a", "recipe_options": {"codes": "a"}}, "codes is given twice"),
        ({"data": "data", "metadata": "clinical.csv"}, "metadata and data are given"),
    ],
)
def test_options_that_no_recipe_takes_are_refused(source: Path, changes: dict[str, object], message: str) -> None:
    values = {"source": str(source / "zenodo"), "out": str(source / "out"), **changes}
    with pytest.raises(UserError, match=re.escape(message)):
        Experiment(build(ExperimentSettings, values))
