from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.metadata.audit_text import audit_text
from latent_medi.metadata.settings import AuditSettings
from latent_medi.metadata.table_index import audit_index, audit_table, read_table_index

CODES = (
    "TSS Code\tSource Site\tStudy Name\tBCR\nNA\tDuke University\tU\tB\n4P\tDuke\tH\tB\nE2\tRoswell Park\tB\tB\n"
    "73\tRoswell\tL\tB\n12\tDuke\tG\tB\nG2\tRoswell Park\tB\tB\n"
)


def write(tmp_path: Path) -> Path:
    """Two cancers at three hospitals' codes each; "NA" blank, as a spreadsheet program leaves it."""
    lines = ["project_id,tissue_source_site,case_submitter_id,slide_submitter_id,race"]
    for number, (project, code, told) in enumerate(
        [("UCS", "NA", ""), ("UCS", "E2", "E2"), ("LUAD", "73", "73"), ("LUAD", "4P", "4P"), ("LUAD", "12", "12")]
    ):
        for p in range(12):
            case = f"TCGA-{code}-{number}{p:03d}"
            lines.append(f"{project},{told},{case},{case}-01Z-00-DX1,{'white' if p % 3 else 'not reported'}")
    path = tmp_path / "slides.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return path


def settings(tmp_path: Path, **more: object) -> AuditSettings:
    return AuditSettings(data=str(write(tmp_path)), class_field="project_id", site_field="tissue_source_site", **more)


def test_codes_fall_apart_and_institutions_do_not(tmp_path: Path) -> None:
    codes = audit_table(settings(tmp_path))
    assert (codes["sites"], codes["components"]) == (5, 2)
    assert "NA" in codes["margins"]["tissue_source_site"]
    assert any("tss_table" in sentence for sentence in codes["advice"])
    (tmp_path / "codes.tsv").write_text(CODES)
    mapped = audit_table(settings(tmp_path, tss_table=str(tmp_path / "codes.tsv")))
    assert (mapped["sites"], mapped["components"]) == (2, 1)
    assert mapped["institutions"] == {
        "codes": 5,
        "components_of_codes": 2,
        "source_sites": 4,
        "source_sites_with_several_classes": 0,
        "institutions": 2,
        "kinds": {"hospital": 2},
    }
    assert "5 codes in 2 components become 2 institutions in one" in audit_text(mapped)


def test_the_command_writes_json_and_a_figure(tmp_path: Path) -> None:
    table, out = write(tmp_path), tmp_path / "audit.json"
    words = ["audit", str(table), "--class-field", "project_id", "--site-field", "tissue_source_site"]
    assert main([*words, "--figure", str(tmp_path / "audit.png"), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["sites"] == 5
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_split_of_a_table_keeps_every_cell(tmp_path: Path) -> None:
    table, out = write(tmp_path), tmp_path / "split.csv"
    words = [
        "split",
        str(table),
        f"out={out}",
        "site_field=tissue_source_site",
        "sites=['NA']",
        "fractions={train: 1.0}",
    ]
    assert main(words) == 0
    before = pd.read_csv(table, dtype=str, keep_default_na=False)
    after = pd.read_csv(out, dtype=str, keep_default_na=False)
    pd.testing.assert_frame_equal(after.drop(columns="split_main"), before, check_names=False)
    test = after["split_main"] == "test"
    assert set(after.loc[test, "case_submitter_id"].str[5:7]) == {"NA"}
    assert test.sum() == 12
    assert main([*words[:1], str(out), f"out={tmp_path / 'again.csv'}", *words[3:]]) == 2  # the column is there


def test_a_site_that_barcodes_hold_is_asked_for_by_its_setting(tmp_path: Path) -> None:
    table = str(write(tmp_path))
    with pytest.raises(
        UserError, match=r"(?s)lacks column 'site'.*slide_submitter_id hold.*site_field=tss.*tss_table=…"
    ):
        audit_table(AuditSettings(data=table, class_field="project_id"))
    assert audit_table(AuditSettings(data=table, class_field="project_id", site_field="tss"))["sites"] == 5
    with pytest.raises(UserError) as caught:  # the class is what lacks
        audit_table(AuditSettings(data=table, class_field="cancer", site_field="tss"))
    assert "tss_table" not in str(caught.value)


def test_tables_without_what_is_needed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("class,site\na,x\n")
    with pytest.raises(UserError, match="has no patient"):
        read_table_index(path, "class", "site")
    path.write_text("class,site,patient\na,x,p\nb,y,\n")
    with pytest.raises(UserError, match="row 2 has no patient"):
        read_table_index(path, "class", "site")
    with pytest.raises(UserError, match="closest: 'site'"):
        read_table_index(path, "class", "sites")
    (tmp_path / "codes.tsv").write_text("TSS Code\tSource Site\tStudy Name\tBCR\nE2\tRoswell Park\tB\tB\n")
    with pytest.raises(UserError, match=r"4 site codes are not in .*: 12, 4P, 73, NA"):
        audit_table(settings(tmp_path, tss_table=str(tmp_path / "codes.tsv")))


def test_a_dataset_folders_codes_are_mapped_too(tmp_path: Path) -> None:
    index, schema = read_table_index(write(tmp_path), "project_id", "tissue_source_site")
    index["split_main"] = ["train" if site != "12" else "test" for site in index["tissue_source_site"]]
    (tmp_path / "codes.tsv").write_text(CODES)
    more = settings(tmp_path, tss_table=str(tmp_path / "codes.tsv"))
    whole = audit_index(index, schema, more)
    assert (whole["sites"], whole["components"], whole["institutions"]["codes"]) == (2, 1, 5)
    train = audit_index(index, schema, more, ("main", "train"))
    assert (train["split"], train["institutions"]["codes"]) == ("split_main = train", 4)
    assert train["counts"]["patients"] == 48
