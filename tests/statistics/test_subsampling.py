"""Subsamples give every group or patient its turn, and repeat a draw for the same seed."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from latent_medi.statistics.subsampling import balanced_draw, patients_in_turn, repeated_draw, whole_patients


def test_draws_repeat_only_when_all_are_used() -> None:
    rng = np.random.default_rng(0)
    assert sorted(repeated_draw(np.arange(5), 12, rng).tolist()).count(0) in (2, 3)
    groups = np.array(["a"] * 2 + ["b"] * 30)
    drawn = balanced_draw(groups, 20, rng)
    assert (groups[drawn] == "a").sum() == 10
    assert len(set(drawn[groups[drawn] == "b"])) == 10
    assert len(repeated_draw(np.zeros(0, int), 3, rng)) == 0


def test_without_repeats_a_small_group_gives_what_it_has() -> None:
    groups = np.array(["a"] * 2 + ["b"] * 30 + ["c"] * 30)
    drawn = balanced_draw(groups, 20, np.random.default_rng(0), repeat=False)
    assert len(set(drawn)) == len(drawn)
    assert pd.Series(groups[drawn]).value_counts().to_dict() == {"b": 7, "c": 7, "a": 2}


@pytest.mark.parametrize("last_by_name", [False, True])
def test_patients_take_turns(last_by_name: bool) -> None:
    patients = np.array(["a"] * 50 + ["b"] * 2 + ["c"] * 10)
    first, again, other = (
        patients_in_turn(patients, 14, np.random.default_rng(seed), last_by_name) for seed in (0, 0, 1)
    )
    assert first.tolist() == sorted(set(first.tolist()))
    assert pd.Series(patients[first]).value_counts().to_dict() == {"a": 6, "c": 6, "b": 2}
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(patients_in_turn(patients, 62, np.random.default_rng(0)), np.arange(62))


def test_patients_of_the_last_turn_by_name_or_by_chance() -> None:
    patients = np.repeat([f"p{i}" for i in range(10)], 3)
    by_name = patients_in_turn(patients, 14, np.random.default_rng(0), last_by_name=True)
    assert pd.Series(patients[by_name]).value_counts().loc[["p0", "p1", "p2", "p3"]].tolist() == [2] * 4
    drawn = [patients_in_turn(patients, 14, np.random.default_rng(seed)) for seed in range(20)]
    assert {patients[rows][i] for rows in drawn for i in range(14)} == set(patients)
    assert len({tuple(np.unique(patients[rows], return_counts=True)[1]) for rows in drawn}) > 5


def test_whole_patients_are_taken_until_there_are_enough() -> None:
    patients = np.repeat([f"p{i}" for i in range(10)], 5)
    rows = whole_patients(patients, 23, np.random.default_rng(0))
    assert (np.diff(rows) > 0).all()
    assert sorted(pd.Series(patients[rows]).value_counts()) == [3, 5, 5, 5, 5]
    np.testing.assert_array_equal(whole_patients(patients, 50, np.random.default_rng(0)), np.arange(50))
