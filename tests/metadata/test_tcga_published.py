"""Held against the published tables of TCGA slides; skipped where they are absent."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from latent_medi.metadata.settings import AuditSettings, SplitSettings
from latent_medi.metadata.split_schemes import make_split
from latent_medi.metadata.table_index import audit_table, read_table_index


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
