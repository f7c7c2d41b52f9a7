"""What spreadsheets and downloads leave in a table: the data are read as if it were not there, and it is named."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.metadata.table_index import read_table_index
from latent_medi.metadata.tables import read_table

LINES = ["image,patient,class,site", "a.png,P1,tumour,NA", "b.png,P2,normal,01"]
CLEAN = pd.DataFrame(
    {"image": ["a.png", "b.png"], "patient": ["P1", "P2"], "class": ["tumour", "normal"], "site": ["NA", "01"]}
)


def put(path: Path, lines: list[str], encoding: str = "utf-8") -> Path:
    path.write_bytes("".join(line + "\r\n" for line in lines).encode(encoding))
    return path


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (LINES + [",,,"] * 3, ["3 rows (lines 4, 5, 6) are left out: empty"]),
        ([LINES[0], " , ,,", *LINES[1:]], ["line 2 is left out: empty"]),
        ([line + ",," for line in LINES], ["column 5 is left out", "column 6 is left out: it has no name, and it is"]),
        ([LINES[0] + ",,", LINES[1] + ",,", LINES[2] + ",x,"], ["column 5", "such as 'x' in line 3, are not read"]),
        ([LINES[0] + ",,", *LINES[1:]], ["column 5 is left out"]),
        ([LINES[0] + ",", *LINES[1:], ",,,,a note"], ["column 5", "'a note' in line 4", "line 4 is left out: empty"]),
        (["Patches of the study,,,", *LINES], ["line 1 is left out: a title", "'Patches of the study'"]),
        (["The study; draft", "", "2026", *LINES], ["line 1 is left out: a title", "line 3 is left out: a title"]),
        (["sep=,", *LINES], []),
        (['"sep=,"', *LINES, ",,,"], ["line 5 is left out: empty"]),
        ([*LINES[:2], LINES[0], LINES[2]], ["line 3 is left out: rows of headings"]),
        ([line + "," for line in LINES[:1]] + [line + ",,," for line in LINES[1:]], ["column 5"]),
    ],
)
def test_what_is_beside_the_data_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, lines: list[str], words: list[str]
) -> None:
    pd.testing.assert_frame_equal(read_table(put(tmp_path / "t.csv", lines)), CLEAN, check_dtype=False)
    for word in words:
        assert word in caplog.text
    assert bool(caplog.text) == bool(words)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le-bom"])
def test_encodings_with_a_mark_are_read(tmp_path: Path, encoding: str) -> None:
    lines = [line.replace(",", "\t").replace("NA", "Köln") for line in LINES]
    if encoding.endswith("bom"):
        lines, encoding = ["\ufeff" + lines[0], *lines[1:]], "utf-16-le"
    assert read_table(put(tmp_path / "t.tsv", lines, encoding))["site"].tolist() == ["Köln", "01"]


def test_a_biotabs_headings_are_no_patients(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    head = ["bcr_patient_uuid\tbcr_patient_barcode\tgender", "bcr_patient_uuid\tbcr_patient_barcode\tsex"]
    rows = ["u1\tTCGA-AB-1000\tMALE", "u2\tTCGA-NA-1001\t[Not Available]"]
    for codes in ("CDE_ID:\tCDE_ID:2003301\tCDE_ID:2200604", "CDE_ID:\tCDE_ID:2003301\t"):
        path = put(tmp_path / "bio.tsv", [*head, codes, *rows])
        index, schema = read_table_index(path, "gender", patient_field="bcr_patient_barcode")
        assert index["patient"].tolist() == ["TCGA-AB-1000", "TCGA-NA-1001"]
        assert schema.field("gender").values == ("MALE",)
        assert "2 rows (lines 2, 3) are left out: rows of headings" in caplog.text
    assert len(read_table(put(tmp_path / "b.tsv", [head[0], codes, *rows]))) == 2


def test_a_row_per_treatment_is_no_problem_and_a_contradiction_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = "cases.submitter_id\tproject.project_id\tdemographic.race\ttreatments.treatment_type"
    rows = [f"TCGA-AB-100{i}\tTCGA-LUAD\twhite\t{kind}" for i in range(3) for kind in ("Radiation", "'--")]
    words = ["project.project_id", "", ["demographic.race"]]
    index, schema = read_table_index(put(tmp_path / "c.tsv", [names, *rows]), *words)
    assert index["patient"].nunique() == 3
    assert schema.field("demographic.race").values == ("white",)
    assert caplog.text == ""
    rows += ["TCGA-AB-1001\tTCGA-LUSC\tasian\tSurgery", "TCGA-AB-1002\tTCGA-LUAD\tnot reported\tSurgery"]
    read_table_index(put(tmp_path / "c.tsv", [names, *rows]), *words)
    assert "1 patients have several values of demographic.race, such as TCGA-AB-1001: asian, white" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image,patient,comment\na.png,P1,x\nb.png,P2\n", r"Line 3 of .*t\.csv has 2 cells; the header has 3"),
        (b"image,patient\na.png,P1,x\n", r"Line 2 of .* has 3 cells"),
        ("site\nKöln\n".encode("cp1252"), r"not UTF-8: line 2 has 'Köln' if it is Windows-1252"),
        (b"sep=;\nimage;patient\n", "by semicolons, not by commas"),
        (b"image\tpatient\na.png\tP1\n".decode().encode("utf-16"), "by tabs, not by commas"),
        (b"image,patient\na.png,P1\n".decode().encode("utf-16-le"), "not text, or is UTF-16"),
        (b"PK\x03\x04\x14\0\6\0", "spreadsheet file with another ending"),
        (b",,\n,,\n", "is empty"),
        (b'image,patient\n"a.png"x,P1\n', "in line 2"),
        (b"image\na.png\nb.png,P2\nc.png\n", "Line 3 of .* has 2 cells"),
    ],
)
def test_what_cannot_be_read_is_one_message(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_what_is_no_table_is_named_and_does_not_hang(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder.csv").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    put(tmp_path / "book.xlsx", LINES)
    put(tmp_path / "only.csv", LINES[:1])
    for name, words in (
        ("folder.csv", "is a folder, not a table"),
        ("pipe.csv", "a pipe or device"),
        ("none.csv", "does not exist"),
        ("book.xlsx", "Save it as CSV UTF-8"),
        ("only.csv", "has no row"),
    ):
        out = tmp_path / "out"
        assert main(["shards", "images", f"table={tmp_path / name}", f"out={out}", "source_mpp=0.5"]) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()
    put(tmp_path / "table.txt", LINES)
    assert main(["audit", str(tmp_path / "table.txt")]) == 2
    assert "neither .csv, .tsv nor .parquet" in capsys.readouterr().err


def test_a_table_in_parquet_loses_its_leftovers_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.parquet"
    pd.concat([CLEAN, CLEAN[:0].reindex([0])]).rename(columns={"site": " site "}).to_parquet(path, index=False)
    pd.testing.assert_frame_equal(read_table(path)[list(CLEAN)], CLEAN, check_dtype=False)
    assert "left out: empty" in caplog.text


word = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\n", exclude_categories=["C"]), max_size=6)
name = st.from_regex(r"[a-z_.]{1,8}", fullmatch=True).filter(lambda text: text not in ("sep", "nan", "inf", "infinity"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), mark=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), ending=st.sampled_from(["\n", "\r\n"]))
def test_leftovers_anywhere_change_no_cell(tmp_path: Path, data: st.DataObject, mark: str, ending: str) -> None:
    names = data.draw(st.lists(name, min_size=2, max_size=4, unique=True))
    cells = st.lists(word.map(str.strip), min_size=len(names), max_size=len(names))
    rows = data.draw(st.lists(cells.filter(lambda row: sum(map(bool, row)) > 1 and row != names), max_size=5))
    blanks = data.draw(st.integers(0, 2))
    lines = [[*row, *[" "] * blanks] for row in (names, *rows)]
    for place in data.draw(st.lists(st.integers(1, len(lines)), max_size=3)):
        lines.insert(place, [""] * (len(names) + blanks))
    lines += [lines[0]] * data.draw(st.integers(0, 1))
    if data.draw(st.booleans()):
        lines.insert(0, ["Title, and more", *[""] * data.draw(st.integers(0, 3))])
    text = io.StringIO()
    if data.draw(st.booleans()):
        text.write("sep=," + ending)
    csv.writer(text, lineterminator=ending).writerows(lines)
    path = tmp_path / "t.csv"
    path.write_bytes(text.getvalue().encode(mark))
    table = read_table(path)
    pairs = [[value for key, value in zip(names, row, strict=True)] for row in rows]
    heading = [row for row in pairs if all(value in ("", key) for key, value in zip(names, row, strict=True))]
    assert list(table.columns) == names
    assert table.to_numpy().tolist() == [row for row in pairs if row not in heading]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.one_of(st.binary(max_size=60), st.text("abP1,;\t\"\n\r= .'", max_size=60).map(str.encode)))
def test_any_content_is_a_table_or_one_message(tmp_path: Path, content: bytes) -> None:
    for ending in (".csv", ".tsv", ".parquet"):
        path = tmp_path / f"t{ending}"
        path.write_bytes(content)
        try:
            table = read_table(path)
        except UserError:
            continue
        assert all(str(column).strip() for column in table.columns)
        assert all(isinstance(cell, str) for row in table.to_numpy().tolist() for cell in row)
        assert all(any(row) for row in table.to_numpy().tolist())
