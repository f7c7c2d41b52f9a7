"""A model's record of what it was shown answers as its training table would."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_medi.metadata.schema import Schema
from latent_medi.metadata.training_record import merge_records, training_record, was_trained_on

ROWS = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.sampled_from(["old", "new"])), min_size=1)
FIELDS = ("class", "site", "scanner")


def record_of(rows: list[tuple[str, str, str]]) -> tuple[pd.DataFrame, dict]:
    table = pd.DataFrame(rows, columns=list(FIELDS)).assign(age=50.0, patient="p1")
    return table, training_record(table, Schema.from_table(table, "class", ["site", "scanner"], ["age"]))


@given(ROWS, ROWS, st.dictionaries(st.sampled_from(FIELDS), st.sampled_from([*"abcxyz", "old", "new"])))
def test_the_record_answers_as_the_tables(first: list, second: list, asked: dict[str, str]) -> None:
    (table, record), (other, later) = record_of(first), record_of(second)
    both = json.loads(json.dumps(merge_records(record, later)))  # as a model's folder keeps it

    def shown(rows: pd.DataFrame) -> bool:
        return bool((rows[list(asked)] == pd.Series(asked)).all(axis=1).any()) if asked else True

    assert was_trained_on(record, asked) == shown(table)
    assert was_trained_on(both, asked) == (shown(table) or shown(other))


def test_what_cannot_be_known() -> None:
    _, record = record_of([("a", "x", "old")])
    assert was_trained_on(None, {"class": "a"}) is None
    assert was_trained_on(record, {"class": "a", "hospital": "x"}) is None  # a field that training did not have
    started = merge_records(record, None)  # from a model without a record
    assert was_trained_on(started, {"class": "b"}) is None
    assert was_trained_on(started, {"class": "a"}) is True
    assert sum(row[-1] for row in record_of([("a", "x", "old")] * 3)[1]["parts"][0]["rows"]) == 3


def test_too_many_combinations_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latent_medi.metadata.training_record._MOST", 1)
    _, record = record_of([("a", "x", "old"), ("b", "x", "old")])
    assert was_trained_on(record, {"class": "c"}) is None
