from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.metadata.tcga import (
    Barcode,
    clinical_fields,
    institution,
    parse_barcode,
    read_site_codes,
    site_codes,
    slide_key,
)

UUID = "8923A151-A690-40B7-9E5A-FCBEDFC2394F"
CHARACTERS = st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
TWO = st.text(CHARACTERS, min_size=2, max_size=2)
FOUR = st.text(CHARACTERS, min_size=4, max_size=4)
DIGITS = st.from_regex("[0-9]{2}", fullmatch=True)
LETTER = st.sampled_from("ABCDZ")
SLIDE = st.from_regex("(DX|TS|BS|MS)[A-Z0-9]", fullmatch=True)


@st.composite
def barcodes(draw: st.DrawFn) -> Barcode:
    """Barcodes of every length: case, sample, portion, slide, analyte, plate, centre."""
    depth = draw(st.integers(0, 6))
    parts = {"tss": draw(TWO), "participant": draw(FOUR)}
    if depth >= 1:
        parts |= {"sample": draw(DIGITS), "vial": draw(LETTER)}
    if depth >= 2:
        parts["portion"] = draw(DIGITS)
    if depth == 3:
        parts["slide"] = draw(SLIDE)
    if depth >= 4:
        parts["analyte"] = draw(LETTER)
    if depth >= 5:
        parts["plate"] = draw(FOUR)
    if depth >= 6:
        parts["center"] = draw(DIGITS)
    return Barcode(**parts)


@given(barcode=barcodes(), lower=st.booleans(), folder=st.booleans(), uuid=st.booleans(), ending=st.booleans())
def test_every_barcode_is_read_back(barcode: Barcode, lower: bool, folder: bool, uuid: bool, ending: bool) -> None:
    text = str(barcode) + (f".{UUID}" if uuid else "") + (".svs" if ending else "")
    text = ("some.folder/TCGA-XX/" if folder else "") + (text.lower() if lower else text)
    assert parse_barcode(text) == barcode
    assert parse_barcode(text).patient == str(barcode)[:12]


@given(st.text(max_size=40))
def test_what_is_no_barcode_is_refused(text: str) -> None:
    if "TCGA-" not in text.upper():
        with pytest.raises(UserError, match="no TCGA barcode"):
            parse_barcode(text)


def test_parts_of_known_barcodes() -> None:
    slide = parse_barcode(f"TCGA-3L-AA1B-01Z-00-DX1.{UUID}.svs")
    assert (slide.tss, slide.patient, slide.slide, slide.tumour, slide.frozen) == (
        "3L",
        "TCGA-3L-AA1B",
        "DX1",
        True,
        False,
    )
    assert parse_barcode("TCGA-NA-A4QV").tss == "NA"
    assert parse_barcode("TCGA-02-0001-11A-01-TS1").tumour is False
    assert parse_barcode("TCGA-02-0001-01C-01D-0182-01").center == "01"
    assert parse_barcode("TCGA-02-0001").tumour is None
    # The dot before the UUID would cut a WebDataset key: every patch of a slide would become one sample.
    assert slide_key(f"slides/tcga-3l-aa1b-01z-00-dx1.{UUID.lower()}.svs") == "TCGA-3L-AA1B-01Z-00-DX1"
    for bad in ("TCGA-3L-AA1", "TCGA-3L-AA1B-01Z-00-DX1_x1_y2.png", "GTEX-1117F-0126", ""):
        with pytest.raises(UserError, match="no TCGA barcode"):
            parse_barcode(bad)
    with pytest.raises(UserError, match="not of a slide"):
        slide_key("TCGA-3L-AA1B")


def test_the_barcode_decides_over_a_damaged_column() -> None:
    names = ["TCGA-NA-A4QV", "TCGA-01-0001", "TCGA-E2-A14V"]
    # Read with NA as missing, and without leading zeros.
    assert site_codes(names, ["", "1", "e2"]) == ["NA", "01", "E2"]
    with pytest.raises(UserError, match=r"'TCGA-E2-A14V' is of site 'E2', but the table says 'BH'"):
        site_codes(names, ["NA", "01", "BH"])


def table(tmp_path: Path, rows: str) -> Path:
    path = tmp_path / "codes.tsv"
    path.write_text("TSS Code\tSource Site\tStudy Name\tBCR\n" + rows)
    return path


def test_aliases_brokers_and_leading_zeros_of_the_code_table(tmp_path: Path) -> None:
    rows = "1\tRoswell\tS\tB\nNA\tDuke University\tU\tB\nE2\tRoswell Park\tT\tB\n"
    rows += "UE\t Asterand\tS\tB\nQ9\tNew Place\tS\tB\n"
    codes = read_site_codes(table(tmp_path, rows))
    assert codes["institution"].to_dict() == {
        "01": "Roswell Park",
        "NA": "Duke University",
        "E2": "Roswell Park",
        "UE": "Asterand",
        "Q9": "New Place",
    }
    assert codes.loc["UE", "kind"] == "broker"
    assert codes.loc["Q9", "kind"] == "unlisted"
    assert codes.loc["UE", "source_site"] == " Asterand"  # as written
    assert institution("ILSbio") == institution("ILSBIO") == ("ILSBio", "broker")
    with pytest.raises(UserError, match="lists the code '01' twice"):
        read_site_codes(table(tmp_path, "1\tA\tS\tB\n01\tB\tS\tB\n"))
    (tmp_path / "other.tsv").write_text("code\tname\n01\tA\n")
    with pytest.raises(UserError, match="lacks column 'TSS Code'"):
        read_site_codes(tmp_path / "other.tsv")


def test_clinical_fields_by_any_name_and_marker() -> None:
    found = clinical_fields(
        pd.DataFrame(
            {
                "cases.submitter_id": ["tcga-na-a4qv", "TCGA-01-0001", "TCGA-E2-A14V", "TCGA-BH-A0B1"],
                "demographic.gender": ["Female", "'--", "male", "Unknown"],
                "race": ["not reported", "white", "not allowed to collect", "BLACK OR AFRICAN AMERICAN"],
                "age_at_index": ["72", "'--", "61.5", ""],
            }
        )
    )
    assert found["patient"].tolist()[:2] == ["TCGA-NA-A4QV", "TCGA-01-0001"]
    assert found["gender"].tolist() == ["female", "unknown", "male", "unknown"]
    assert found["race"].tolist() == ["unknown", "white", "unknown", "black or african american"]
    assert found["age"].tolist() == ["72", "unknown", "61.5", "unknown"]
    for bad in ("26379", "61,5", "-3"):
        with pytest.raises(UserError, match="not a number of years"):
            clinical_fields(pd.DataFrame({"case_submitter_id": ["TCGA-01-0001"], "age_at_index": [bad]}))
    with pytest.raises(UserError, match="has no patient"):
        clinical_fields(pd.DataFrame({"race": ["white"]}))
