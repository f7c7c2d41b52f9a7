"""Row filters: which rows they keep, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from latent_medi.core.config import parse
from latent_medi.core.errors import UserError
from latent_medi.metadata.row_filter import only_mask, only_text
from latent_medi.metadata.settings import AuditSettings, SplitSettings
from latent_medi.metadata.split_schemes import make_split
from latent_medi.metadata.table_index import audit_table, split_table

ROWS = pd.DataFrame(
    {
        "patient": ["p1", "p1", "p2", "p3", "p4", "p5"],
        "slide": ["s1", "s1", "s2", "s3", "s4", "s5"],
        "class": ["LUAD", "LUSC", "LUAD", "UCEC", "UCS", "LUAD"],
        "tss": ["05", "05", "NA", "NA", "NA", "unknown"],
        "age": [50.0, 50.0, 61.0, float("nan"), 70.0, 71.0],
    }
)


@pytest.mark.parametrize(
    ("only", "kept"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"class": ["LUAD"]}, [0, 2, 5]),
        ({"class": ["LUAD", "LUSC"], "tss": ["05"]}, [0, 1]),
        ({"tss": ["NA"]}, [2, 3, 4]),
        ({"tss": ["unknown"]}, [5]),
        ({"slide": ["s4"]}, [4]),
    ],
)
def test_rows_with_one_of_the_values_of_every_field(only: dict[str, list[str]], kept: list[int]) -> None:
    assert [i for i, keep in enumerate(only_mask(ROWS, only, "the table")) if keep] == kept


@pytest.mark.parametrize(
    ("only", "said"),
    [
        ({"clas": ["LUAD"]}, "only names 'clas', no field of the table; closest: 'class'"),
        ({"class": ["LUADD"]}, "No row of the table has class = 'LUADD'; closest: 'LUAD'"),
        ({"age": ["50"]}, "only names 'age', a column of numbers"),
        ({"class": []}, "only.class lists no value"),
        ({"class": ["UCS"], "tss": ["05"]}, "No row of the table has class UCS, and tss 05"),
    ],
)
def test_what_does_not_occur_is_refused_with_the_closest(only: dict[str, list[str]], said: str) -> None:
    with pytest.raises(UserError) as caught:
        only_mask(ROWS, only, "the table")
    assert said in str(caught.value)
    assert only_text({"class": ["A", "B"], "site": ["n"]}) == "class A or B, and site n"


def test_codes_on_the_command_line_stay_text() -> None:
    """05 is a code and no number, NA is a code and not missing, no is no truth value."""
    words = ["data=x", "only.tss=[05, NA, no]", "--only.class", "LUAD", "LUSC"]
    assert parse(SplitSettings, words).only == {"tss": ["05", "NA", "no"], "class": ["LUAD", "LUSC"]}


def cohort(patients: int = 40) -> pd.DataFrame:
    """Patients with one slide each of four classes at two sites."""
    rows = [
        {"patient": f"p{i:03d}", "slide": f"s{i:03d}", "class": "abcd"[i % 4], "site": "xy"[(i // 4) % 2], "kind": "dx"}
        for i in range(patients)
    ]
    return pd.DataFrame(rows)


def test_a_split_of_some_rows_is_that_of_these_rows_alone() -> None:
    table, wanted = cohort(), SplitSettings(fractions={"train": 0.5, "test": 0.5})
    split = make_split(table, SplitSettings(**(vars(wanted) | {"only": {"class": ["a", "b"]}})))
    some = table["class"].isin(["a", "b"])
    assert (split.column[~some] == "").all()
    assert split.column[some].tolist() == make_split(table[some], wanted).column.tolist()
    assert split.recipe["only"] == {"class": ["a", "b"]}
    assert "only" not in make_split(table, wanted).recipe


def test_tables_are_split_and_audited_by_a_filter_on_any_column(tmp_path: Path) -> None:
    table = cohort()
    table.loc[:9, "kind"] = "frozen"
    table.to_csv(tmp_path / "slides.csv", index=False)
    only = {"kind": ["frozen"]}
    settings = SplitSettings(data=str(tmp_path / "slides.csv"), out=str(tmp_path / "split.csv"), only=only)
    split_table(settings)
    written = pd.read_csv(tmp_path / "split.csv", keep_default_na=False)["split_main"]
    assert (written[10:] == "").all()
    assert set(written[:10]) == {"train", "test"}
    found = audit_table(AuditSettings(data=str(tmp_path / "slides.csv"), only=only | {"class": ["a", "c"]}))
    assert found["counts"]["patients"] == sum(c in "ac" for c in table["class"][:10])
    assert set(found["fields"]) == {"class", "site"}  # the filter's own column is not reported
    # Verdicts are on what is left alone: no line on classes that were filtered out.
    assert {entry["combination"]["class"] for entry in found["verdicts"]} == {"a", "c"}
