"""Plans: made from what is missing, editable, and checked before anything is generated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from latent_medi.errors import UserError
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.synthesis.plan import check_plan, make_plan, read_plan, sample_at, stable_seed, write_plan


def test_fill_unseen_plans_exactly_the_missing_combination(index: pd.DataFrame, schema: Schema) -> None:
    plan = make_plan(index, schema, "fill_unseen", per_cell=7, thin_patients=2)
    assert plan[["class", "site", "age", "count"]].to_dict("records") == [
        {"class": "tumour", "site": "birch", "age": "real", "count": 7}
    ]
    assert plan["verdict"].tolist() == ["both margins seen"]


def test_balance_tops_every_combination_up(index: pd.DataFrame, schema: Schema) -> None:
    plan = make_plan(index, schema, "balance", thin_patients=2)
    counts = {(row["class"], row["site"]): row["count"] for row in plan.to_dict("records")}
    present = index.groupby(["class", "site"]).size()
    assert counts == {
        (c, s): 6 - int(present.get((c, s), 0))
        for c in ("benign", "tumour")
        for s in ("NA", "aster", "birch")
        if present.get((c, s), 0) < 6
    }


def test_each_plans_all_and_fields_choose_what_is_combined(index: pd.DataFrame, schema: Schema) -> None:
    assert len(make_plan(index, schema, "each", per_cell=3)) == 6
    plan = make_plan(index, schema, "each", per_cell=3, fields=["class"])
    assert plan[["class", "site"]].to_numpy().tolist() == [["benign", ""], ["tumour", ""]]


def test_unidentifiable_combinations_are_listed_with_count_0(index: pd.DataFrame, schema: Schema) -> None:
    pairs = zip(index["class"], index["site"], strict=True)
    apart = index[[pair in {("benign", "aster"), ("tumour", "NA")} for pair in pairs]]
    plan = make_plan(apart, schema, "fill_unseen", per_cell=5, thin_patients=1)
    assert len(plan) == 4
    assert (plan["verdict"] == "unidentifiable").all()
    assert (plan["count"] == 0).all()


def test_seeds_are_stable_and_differ(index: pd.DataFrame, schema: Schema) -> None:
    plan = make_plan(index, schema, "each", per_cell=1, seed=3)
    assert plan["seed"].equals(make_plan(index, schema, "each", per_cell=1, seed=3)["seed"])
    assert plan["seed"].nunique() == len(plan)
    assert not plan["seed"].equals(make_plan(index, schema, "each", per_cell=1, seed=4)["seed"])
    assert stable_seed(1, "a", bits=63) == 6148644138517888281  # on every machine and in every release


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_written_and_read_again(suffix: str, index: pd.DataFrame, schema: Schema, tmp_path: Path) -> None:
    plan = make_plan(index, schema, "each", per_cell=3)
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
    ],
)
def test_what_cannot_be_meant_is_refused(rows: list[dict], words: str, schema: Schema) -> None:
    with pytest.raises(UserError, match=words):
        check_plan(pd.DataFrame(rows), schema)


def test_plan_settings_that_mean_nothing(index: pd.DataFrame, schema: Schema) -> None:
    for arguments, words in (
        ({"goal": "fill_unsen", "per_cell": 1}, "fill_unseen"),
        ({"goal": "each", "per_cell": 0}, "per_cell"),
        ({"goal": "each", "per_cell": -3}, "per_cell"),
        ({"goal": "each", "per_cell": 1, "fields": ["age"]}, "continuous"),
        ({"goal": "each", "per_cell": 1, "fields": ["gender"]}, "gender"),
    ):
        with pytest.raises(UserError, match=words):
            make_plan(index, schema, **arguments)


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
