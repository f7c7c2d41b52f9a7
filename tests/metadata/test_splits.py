from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.metadata.splits import assert_patient_disjoint, hold_out, random_split


def index(patients: int = 40, each: int = 3) -> pd.DataFrame:
    rows = [
        {"patient": f"p{p}", "class": "ab"[p % 4 == 0], "site": "xy"[p % 2], "patch": i}
        for p in range(patients)
        for i in range(each)
    ]
    return pd.DataFrame(rows)


def test_a_shared_patient_is_refused_and_named() -> None:
    table = pd.DataFrame({"patient": ["p1", "p1", "p2"], "split_main": ["train", "test", "train"]})
    with pytest.raises(UserError, match=r"'p1' in \['test', 'train'\]"):
        assert_patient_disjoint(table, "split_main")
    table["split_main"] = ["train", "", "test"]
    assert_patient_disjoint(table, "split_main")


@settings(max_examples=60, deadline=None)
@given(patients=st.integers(2, 60), seed=st.integers(0, 10_000), share=st.floats(0.1, 0.9))
def test_patients_stay_whole_and_shares_are_kept(patients: int, seed: int, share: float) -> None:
    table = index(patients)
    split = random_split(table, {"train": share, "test": 1 - share}, seed, ["class", "site"])
    assert split.notna().all()
    assert_patient_disjoint(table.assign(split=split), "split")
    trained = table.loc[split == "train", "patient"].nunique()
    assert abs(trained - share * patients) <= 1.0
    shuffled = table.sample(frac=1, random_state=seed)
    again = random_split(shuffled, {"train": share, "test": 1 - share}, seed, ["class", "site"])
    assert again.sort_index().equals(split)


def test_seeds_differ_and_strata_are_balanced() -> None:
    table = index(80)
    first, second = (random_split(table, {"a": 0.5, "b": 0.5}, seed, ["class", "site"]) for seed in (0, 1))
    assert not first.equals(second)
    per_cell = table.assign(split=first).drop_duplicates("patient").groupby(["class", "site", "split"]).size()
    for _, cell in per_cell.groupby(level=[0, 1]):
        assert len(cell) == 2
        assert abs(cell.iloc[0] - cell.iloc[1]) <= 1


def test_fractions_must_add_up() -> None:
    for fractions in ({}, {"a": 0.5}, {"a": 1.5, "b": -0.5}):
        with pytest.raises(UserError, match="add up to 1"):
            random_split(index(), fractions, 0)


def test_hold_out_matches_any_whole_combination() -> None:
    table = index(8, 1)
    held = hold_out(table, [{"class": "b", "site": "x"}, {"patient": "p3"}])
    assert table.loc[held, "patient"].tolist() == ["p0", "p3", "p4"]
    assert not hold_out(table, []).any()
    with pytest.raises(UserError, match="'z'"):
        hold_out(table, [{"site": "z"}])
    with pytest.raises(UserError, match="no column"):
        hold_out(table, [{}])
