from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.tables import read_table, require_columns, write_for_people, written_for_people


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_na_leading_zeros_and_empty_cells_survive(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"table{suffix}"
    text = "site,class,note\nNA,a,\n01,b,null\n5E, c ,None\n"
    path.write_text("\ufeff" + text.replace(",", "," if suffix == ".csv" else "\t"), encoding="utf-8")
    table = read_table(path)
    assert table["site"].tolist() == ["NA", "01", "5E"]
    assert table["class"].tolist() == ["a", "b", "c"]
    assert table["note"].tolist() == ["", "null", "None"]
    assert Schema.from_table(table, "class", ["site"]).field("site").values == ("01", "5E", "NA")


def test_parquet_is_read_as_strings(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    pd.DataFrame({"site": ["NA", None], "n": [1, 2]}).to_parquet(path)
    assert read_table(path).to_dict("list") == {"site": ["NA", ""], "n": ["1", "2"]}


def test_quoted_cells_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(b'a,b\r\n"x, y","line\nbreak"\r\n\r\n')
    assert read_table(path).to_dict("list") == {"a": ["x, y"], "b": ["line\nbreak"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1\n", "Line 2.*1 cells"),
        (b"a,a\n1,2\n", "same name"),
        (b"", "empty"),
        (b"a\n\xe9\n", "UTF-8"),
        (b'a\n"x\n', "read"),
        (b"image;patient;mpp\na.png;p;0,5\n", "separates its columns by semicolons, not by commas"),
        (b"image\tpatient\na.png\tp\n", "by tabs, not by commas"),
    ],
)
def test_broken_tables_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_table(path)


def test_absent_files_columns_and_other_types(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match="neither"):
        read_table(tmp_path / "table.xlsx")
    with pytest.raises(UserError, match=r"'patent'.*'patient'"):
        require_columns(pd.DataFrame({"patient": []}), ["patent"], "The table")


def test_an_absent_column_is_told_with_its_setting_and_the_columns_there() -> None:
    table = pd.DataFrame({"image": [], "case": []})
    with pytest.raises(UserError, match=r"Its columns: image, case\. Choose one with patient_column=…\.") as caught:
        require_columns(
            table, ["image", "patient"], "The table", {"image": "image_column", "patient": "patient_column"}
        )
    assert "image_column" not in str(caught.value)


_cells = st.text(max_size=8) | st.sampled_from(["=1+1", "+G3", "-ve", "@x", "'=x", "''-", "-1.5", "+3", "\tx", "'--"])


@given(st.lists(_cells.filter(lambda text: text == text.strip() and "\r" not in text), min_size=1, max_size=5))
def test_cells_for_people_run_nothing_and_come_back(tmp_path_factory: pytest.TempPathFactory, cells: list[str]) -> None:
    path = tmp_path_factory.mktemp("people") / "t.csv"
    table = pd.DataFrame({"=A1": cells, "count": range(len(cells))})
    write_for_people(table, path)
    with open(path, newline="", encoding="utf-8") as file:
        written = list(csv.reader(file))
    for cell in (cell for row in written for cell in row):
        assert not cell.startswith(("=", "@", "\t", "+", "-")) or cell in ("-1.5", "+3") or _is_number(cell)
    back = written_for_people(read_table(path))
    assert list(back.columns) == ["=A1", "count"]
    assert back["=A1"].tolist() == cells


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
