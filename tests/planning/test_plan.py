"""Plans: made from what is missing, editable, and checked before anything is generated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.planning.plan import check_plan, read_plan, sample_at, stable_seed, write_plan


@pytest.fixture
def plan(schema: Schema) -> pd.DataFrame:
    """Three images of every combination."""
    rows = [
        {"class": c, "site": s, "age": "real", "count": 3}
        for c in ("benign", "tumour")
        for s in ("NA", "aster", "birch")
    ]
    return check_plan(pd.DataFrame(rows), schema)


def test_seeds_are_the_same_on_every_machine_and_in_every_release(plan: pd.DataFrame) -> None:
    assert stable_seed(1, "a", bits=63) == 6148644138517888281
    assert plan["seed"].nunique() == len(plan)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_written_and_read_again(suffix: str, plan: pd.DataFrame, schema: Schema, tmp_path: Path) -> None:
    write_plan(plan, tmp_path / f"plan.{suffix}")
    again = read_plan(tmp_path / f"plan.{suffix}", schema)
    pd.testing.assert_frame_equal(again, plan, check_dtype=False)
    assert "NA" in set(again["site"])  # a hospital, not a missing value


def test_a_spreadsheet_may_write_numbers_with_a_point(schema: Schema, tmp_path: Path) -> None:
    (tmp_path / "plan.csv").write_text("class,site,age,count,seed\ntumour,NA,55.0,100.0,7.0\n")
    plan = read_plan(tmp_path / "plan.csv", schema)
    assert plan[["count", "seed"]].to_numpy().tolist() == [[100, 7]]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"class": "tumour", "count": -1}], r"row 1: count is -1"),
        ([{"class": "tumour", "count": 10**9}], "count is 1000000000"),
        ([{"class": "tumour", "count": "1e9"}], "count is 1e9"),
        ([{"class": "tumour", "count": "1e3"}], "count is 1e3; write it in digits"),
        ([{"class": "tumour", "count": "1_000"}], "count is 1_000"),
        ([{"class": "tumour", "count": "12.5"}], r"count is 12\.5"),
        ([{"class": "tumour", "count": "2.5"}], r"count is 2\.5"),
        ([{"class": "tumour", "count": "many"}], "'many'"),
        ([{"class": "tumour", "count": ""}], "no whole number"),
        ([{"class": "tumour", "count": "nan"}], "no whole number"),
        ([{"class": "tumour", "count": "inf"}], "no whole number"),
        ([{"class": "tumour", "site": s, "count": 6 * 10**7} for s in ("NA", "aster")], "120000000"),
        ([{"class": "tumour", "number": 3}], "no column 'count'"),
        ([{"class": "tumour", "hospital": "aster", "count": 3}], "'hospital'"),
        ([{"class": "tumour", "site": "astor", "count": 3}], "'aster'"),
        ([{"class": "tumour", "age": "old", "count": 3}], "'old'"),
        ([{"class": "real", "count": 3}], "'real'"),
        ([{"class": "tumour", "count": 3, "seed": -4}], "seed is -4"),
        ([{"class": "tumour", "count": 3}, {"class": "tumour", "count": 4}], "rows 1 and 2 are the same"),
        ([{"class": "tumour", "age": "real", "age_quantiles": "60 50", "count": 3}], "age_quantiles is '60 50'"),
        ([{"class": "tumour", "age": "real", "age_quantiles": "50, 60", "count": 3}], "'50,', which is no number"),
        ([{"class": "tumour", "age": "real", "age_quantiles": "50 inf", "count": 3}], "'inf'"),
        ([{"class": "tumour", "age": "real", "age_unknown": "1.5", "count": 3}], r"age_unknown is 1\.5"),
        ([{"class": "tumour", "age": "real", "age_quantile": "50 60", "count": 3}], "'age_quantile'"),
        ([{"class": "tumour", "site": "NA", "site_quantiles": "50 60", "count": 3}], "'site_quantiles'"),
    ],
)
def test_what_cannot_be_meant_is_refused(rows: list[dict], words: str, schema: Schema) -> None:
    with pytest.raises(UserError, match=words):
        check_plan(pd.DataFrame(rows), schema)


def test_samples_follow_the_rows(schema: Schema) -> None:
    rows = [{"class": c, "site": "", "age": "unknown", "count": n} for c, n in (("benign", 3), ("tumour", 2))]
    rows.insert(1, {"class": "tumour", "site": "NA", "age": "", "count": 0})
    plan = check_plan(pd.DataFrame(rows), schema)
    ends = np.cumsum(plan["count"].to_numpy())
    samples = [sample_at(plan, schema, i, ends) for i in range(5)]
    assert [(s.row, s.number) for s in samples] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert len({s.seed for s in samples}) == 5
    assert samples[0].fields == {"class": "benign", "age": "unknown"}  # an empty cell is not told to the model


def test_real_values_follow_the_training_data(index: pd.DataFrame, schema: Schema) -> None:
    plan = check_plan(pd.DataFrame([{"class": "benign", "site": "NA", "age": "real", "count": 3000}]), schema)
    ends = np.cumsum(plan["count"].to_numpy())
    drawn = [sample_at(plan, schema, i, ends).fields["age"] for i in range(3000)]
    known = np.array([a for a in drawn if a != UNKNOWN_WORD], dtype=float)
    there = index["age"].dropna()
    assert 1 - len(known) / 3000 == pytest.approx(schema.field("age").missing, abs=0.03)
    assert known.min() >= there.min()
    assert known.max() <= there.max()
    assert np.median(known) == pytest.approx(there.median(), abs=0.7)
    assert drawn[7] == sample_at(plan, schema, 7, ends).fields["age"]


def drawn(rows: list[dict], schema: Schema, n: int = 2000) -> list[str | float]:
    plan = check_plan(pd.DataFrame([{**row, "count": n} for row in rows]), schema)
    ends = np.cumsum(plan["count"].to_numpy())
    return [sample_at(plan, schema, i, ends).fields["age"] for i in range(ends[-1])]


def test_a_row_may_say_what_real_means(schema: Schema) -> None:
    ages = drawn([{"class": "benign", "age": "real", "age_quantiles": "20 30 70"}], schema)
    known = np.array(ages, dtype=float)  # nobody is unknown unless the row says so
    assert 20 <= known.min() < 21
    assert 69 < known.max() <= 70
    assert np.median(known) == pytest.approx(30, abs=1.5)
    ages = drawn([{"class": "benign", "age": "real", "age_quantiles": "20 30", "age_unknown": "0.25"}], schema)
    assert sum(a == UNKNOWN_WORD for a in ages) / len(ages) == pytest.approx(0.25, abs=0.04)
    assert set(drawn([{"class": "benign", "age": "real", "age_unknown": "1"}], schema, 5)) == {UNKNOWN_WORD}
    assert set(drawn([{"class": "benign", "age": "61", "age_quantiles": "20 30"}], schema, 5)) == {"61"}


def test_a_plan_without_such_columns_is_drawn_as_ever(schema: Schema) -> None:
    # Made before there were such columns.
    rows = [{"class": "benign", "age": "real"}, {"class": "tumour", "age": "real", "seed": 7}]
    assert [a if a == UNKNOWN_WORD else round(a, 6) for a in drawn(rows, schema, 4)] == [
        UNKNOWN_WORD,
        48.072891,
        42.1574,
        UNKNOWN_WORD,
        UNKNOWN_WORD,
        UNKNOWN_WORD,
        55.710995,
        41.009161,
    ]
    empty = [{**row, "age_quantiles": "", "age_unknown": ""} for row in rows]
    assert drawn(empty, schema, 4) == drawn(rows, schema, 4)


def test_rows_that_differ_in_what_real_means_are_two(schema: Schema, tmp_path: Path) -> None:
    rows = [{"class": "benign", "age": "real", "age_quantiles": q, "count": 1} for q in ("20 30", "30 40")]
    plan = check_plan(pd.DataFrame(rows), schema)
    assert plan["seed"].nunique() == 2
    assert plan["seed"].tolist() == check_plan(pd.DataFrame(rows))["seed"].tolist()  # with and without the schema
    write_plan(plan, tmp_path / "plan.csv")
    pd.testing.assert_frame_equal(read_plan(tmp_path / "plan.csv", schema), plan, check_dtype=False)


def test_leaving_a_field_out_leaves_out_what_is_said_of_it(schema: Schema) -> None:
    rows = pd.DataFrame([{"class": "benign", "age": "real", "age_quantiles": "20 30", "age_unknown": "0", "count": 1}])
    plan = check_plan(rows, schema.subset(["class"]), ignore=["age"])
    assert list(plan.columns) == ["class", "count", "verdict", "seed"]
    with pytest.raises(UserError, match="'age', no field of the model"):
        check_plan(rows, schema.subset(["class"]))


def test_a_column_without_a_value_asks_nothing_of_a_model_that_lacks_the_field(schema: Schema) -> None:
    rows = pd.DataFrame([{"class": "benign", "site": "", "count": 1}, {"class": "tumour", "site": "", "count": 2}])
    plan = check_plan(rows, schema.subset(["class"]))
    assert list(plan.columns) == ["class", "count", "verdict", "seed"]
    rows.loc[1, "site"] = "aster"
    with pytest.raises(UserError, match="'site', no field of the model"):
        check_plan(rows, schema.subset(["class"]))


def test_what_a_spreadsheet_would_run_is_escaped_and_read_back(tmp_path: Path) -> None:
    schema = Schema.from_table(pd.DataFrame({"class": ["=1+1", "+"], "site": ["@x", "-y"]}), "class", ["site"])
    plan = pd.DataFrame({"class": ["=1+1", "+"], "site": ["@x", "-y"], "count": [3, 4], "seed": [1, 2]})
    write_plan(plan, tmp_path / "plan.csv")
    assert (tmp_path / "plan.csv").read_text() == "class,site,count,seed\n'=1+1,'@x,3,1\n'+,'-y,4,2\n"
    assert read_plan(tmp_path / "plan.csv", schema)[["class", "site", "count"]].values.tolist() == [
        ["=1+1", "@x", 3],
        ["+", "-y", 4],
    ]


def test_a_plan_that_a_spreadsheet_saved_is_the_same(plan: pd.DataFrame, schema: Schema, tmp_path: Path) -> None:
    path = tmp_path / "plan.csv"
    write_plan(plan, path)
    expected = read_plan(path, schema)
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line},,\r\n" for line in ["The plan", *lines, ",,,"]), "utf-8-sig")
    pd.testing.assert_frame_equal(read_plan(path, schema), expected)
