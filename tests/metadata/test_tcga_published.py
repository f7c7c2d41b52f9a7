"""Held against the published tables of TCGA slides; skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latent_medi.core.errors import UserError
from latent_medi.metadata.settings import AuditSettings, SplitSettings
from latent_medi.metadata.split_from_table import split_from_table
from latent_medi.metadata.split_schemes import make_split
from latent_medi.metadata.table_index import audit_table, read_table_index
from latent_medi.metadata.tables import read_table
from latent_medi.metadata.tcga import clinical_fields, fields_by_patient
from latent_medi.metadata.tcga_cancers import CANCERS, cancer_of, other_names, project_of


@pytest.fixture(scope="module")
def tables(shared: Path) -> Path:
    folder = shared / "data" / "tcga_metadata"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return folder


def settings(tables: Path, tss_table: str = "") -> AuditSettings:
    return AuditSettings(
        data=str(tables / "all_slide_metadata.csv"),
        class_field="project_id",
        site_field="tissue_source_site",
        tss_table=tss_table,
    )


def test_626_codes_in_32_components(tables: Path) -> None:
    found = audit_table(settings(tables))
    assert (found["sites"], found["components"]) == (626, 32)
    assert found["margins"]["tissue_source_site"]["NA"]["slides"] == 11


def test_institutions_in_one_component(tables: Path) -> None:
    found = audit_table(settings(tables, str(tables / "tissueSourceSite.tsv")))
    assert found["components"] == 1
    assert found["institutions"]["source_sites"] == 194
    assert found["institutions"]["source_sites_with_several_classes"] == 99
    assert found["sites"] == found["institutions"]["institutions"] < 194
    assert "unlisted" not in found["institutions"]["kinds"]


def test_the_published_split_slide_by_slide(tables: Path) -> None:
    index, _ = read_table_index(
        tables / "all_slide_metadata.csv", "project_id", "tissue_source_site", ["gender", "race"]
    )
    split = make_split(
        index, SplitSettings(scheme="medi", class_field="project_id", site_field="tissue_source_site")
    ).column
    for part, name, count in (("train", "train", 7061), ("test", "holdout", 1665)):
        published = pd.read_csv(tables / f"{name}_metadata_df_complex.csv", dtype=str, keep_default_na=False)
        ours = index.loc[split == part]
        assert len(ours) == count
        assert set(ours["slide"]) == set(published["slide_submitter_id"])
    assert not set(index.loc[split == "train", "patient"]) & set(index.loc[split == "test", "patient"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_published_split_of_a_folder_whatever_the_order_of_its_patches(tables: Path, seed: int) -> None:
    published = {
        slide: part
        for part, name in (("train", "train"), ("test", "holdout"))
        for slide in read_table(tables / f"{name}_metadata_df_complex.csv")["slide_submitter_id"]
    }
    draw = np.random.default_rng(seed)
    slides = [*published, "TCGA-NA-A4QV-01Z-00-DX9", "TCGA-ZZ-0001-01Z-00-DX1"]  # two that the table lacks
    slides = [slide for slide in draw.permutation(slides) for _ in range(draw.integers(1, 3))]
    index = pd.DataFrame({"slide": slides, "patient": [slide[:12] for slide in slides]})
    chosen = SplitSettings(table=str(tables / "all_slide_metadata.csv"), name="medi", scheme="medi", site_field="tss")
    found = split_from_table(index, chosen)
    assert found.column.tolist() == [published.get(slide, "") for slide in slides]
    by_part = index.assign(part=found.column).groupby("part")["slide"].nunique()
    assert by_part.to_dict() == {"": 2, "train": 7061, "test": 1665}


def test_the_simpler_rules(tables: Path) -> None:
    index, _ = read_table_index(tables / "all_slide_metadata.csv", "class", "tss")
    chosen = {
        name: SplitSettings(scheme=name, site_field="tss") for name in ("every_fourth_patient", "every_fourth_site")
    }
    by_site = make_split(index, chosen["every_fourth_site"]).column
    assert by_site.value_counts().to_dict() == {"train": 6484, "test": 2242}
    assert index.loc[by_site == "test", "tss"].nunique() == 147
    for part in ("train", "test"):
        assert index.loc[by_site == part, "class"].nunique() == 32
    by_patient = make_split(index, chosen["every_fourth_patient"]).column
    assert index.loc[by_patient == "test", "patient"].nunique() == 7168 // 4
    # Of the slides that MeDi's code takes, rows 0, 4, 8 …, one patient's can be on both sides.
    rows = pd.Series(np.arange(len(index)) % 4 == 0)
    assert (rows.groupby(index["patient"]).nunique() > 1).sum() == 488


def test_no_patient_and_no_slide_is_lost(tables: Path) -> None:
    table = read_table(tables / "all_slide_metadata.csv")
    assert len(table) == table["slide_submitter_id"].nunique() == 8726
    known = fields_by_patient(clinical_fields(table))
    assert len(known) == 7168
    assert known.index.str.startswith("TCGA-NA-").sum() == 7
    index, schema = read_table_index(tables / "all_slide_metadata.csv", "class", "tss", ["gender", "race"])
    assert len(schema.field("tss").values) == 626
    assert len(index[index["tss"] == "NA"]) == 11
    assert set(index.loc[index["tss"] == "NA", "class"]) == {"Uterine_Carcinosarcoma"}


def test_projects_and_cancers_are_two_names_of_32_classes(tables: Path) -> None:
    pairs = {
        (row.project_id, row.cancer_type)
        for name in ("train", "holdout")
        for row in read_table(tables / f"{name}_metadata_df_complex.csv").itertuples()
    }
    assert len(pairs) == len(CANCERS) == 32
    assert {(project, cancer_of(project)) for project, _ in pairs} == pairs
    assert {(project_of(cancer), cancer) for _, cancer in pairs} == pairs
    assert cancer_of(" luad") == "Lung_adenocarcinoma"
    with pytest.raises(UserError, match="'TCGA-LAML' is none of the 32 projects"):
        cancer_of("TCGA-LAML")
    with pytest.raises(UserError, match="closest: 'Lung_adenocarcinoma'"):
        project_of("Lung_adenocarcinom")
    asked = ["TCGA-LUAD", "Sarcoma", "Thymoma", "ring"]
    assert other_names(asked, {"Lung_adenocarcinoma", "SARC", "Thymoma"}) == {
        "TCGA-LUAD": "Lung_adenocarcinoma",
        "Sarcoma": "SARC",
    }
