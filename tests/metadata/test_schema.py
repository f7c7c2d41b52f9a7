from __future__ import annotations

import json
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import (
    FIRST_VALUE,
    MISSING,
    NULL,
    UNKNOWN,
    UNKNOWN_WORD,
    Field,
    Schema,
    is_missing,
)

values = st.text(min_size=1, max_size=12).filter(lambda v: v == v.strip() and not is_missing(v))
vocabularies = st.lists(values, min_size=1, max_size=12, unique=True)


def schema() -> Schema:
    table = pd.DataFrame(
        {
            "site": ["NA", "01", "unknown", "radboud"],
            "class": ["b", "a", "b", "c"],
            "age": ["40", "60", "", "80.5"],
        }
    )
    return Schema.from_table(table, "class", ["site"], ["age"], {"age": "years"})


@settings(max_examples=150, deadline=None)
@given(vocabulary=vocabularies, data=st.data())
def test_codes_survive_json_for_any_subset_in_any_order(vocabulary: list[str], data: st.DataObject) -> None:
    table = pd.DataFrame({"c": vocabulary, "s": list(reversed(vocabulary))})
    made = Schema.from_table(table, "c", ["s"])
    text = json.dumps(made.to_dict())
    read = Schema.from_dict(json.loads(text))
    resorted = Schema.from_dict(json.loads(json.dumps(made.to_dict(), sort_keys=True)))
    assert read == made == resorted
    for value in vocabulary:
        assert read.field("s").code(value) == resorted.field("s").code(value) == made.field("s").code(value)
        assert made.field("s").value(made.field("s").code(value)) == value
    chosen = data.draw(st.lists(st.sampled_from(vocabulary), max_size=8))
    codes, _ = read.encode(pd.DataFrame({"c": chosen, "s": chosen}, dtype=object))
    assert codes.tolist() == [[made.field("c").code(v), made.field("s").code(v)] for v in chosen]


@settings(max_examples=60, deadline=None)
@given(vocabulary=vocabularies, seed=st.integers(0, 1000))
def test_the_order_of_rows_does_not_change_a_new_vocabulary(vocabulary: list[str], seed: int) -> None:
    shuffled = random.Random(seed).sample(vocabulary, len(vocabulary))
    assert Schema.from_table(pd.DataFrame({"c": vocabulary}), "c") == Schema.from_table(
        pd.DataFrame({"c": shuffled}), "c"
    )
    assert Schema.from_table(pd.DataFrame({"c": shuffled}), "c").field("c").values == tuple(sorted(vocabulary))


@settings(max_examples=60, deadline=None)
@given(old=vocabularies, new=vocabularies)
def test_appended_values_keep_the_old_codes(old: list[str], new: list[str]) -> None:
    added = [v for v in new if v not in old]
    before = Schema((Field("c", "class", tuple(old)),))
    after = before.append("c", added)
    assert [after.field("c").code(v) for v in old] == [before.field("c").code(v) for v in old]
    assert [after.field("c").code(v) for v in added] == list(
        range(FIRST_VALUE + len(old), FIRST_VALUE + len(old + added))
    )
    merged = Schema.merge(before, Schema((Field("c", "class", tuple(new)),)))
    assert merged == after


def test_codes_survive_sorted_json_keys_when_values_were_appended() -> None:
    made = schema().append("site", ["zurich", "00"])
    # diffusers sorts the keys of the configurations that carry a schema
    read = Schema.from_dict(json.loads(json.dumps(made.to_dict(), sort_keys=True)))
    assert read == made
    assert [read.field("site").code(v) for v in ("01", "NA", "radboud", "zurich", "00")] == [2, 3, 4, 5, 6]


def test_codes_are_explicit_and_sorted_at_creation() -> None:
    made = schema()
    assert made.names == ("class", "site", "age")
    assert [made.field("class").code(v) for v in "abc"] == [2, 3, 4]
    assert made.field("site").values == ("01", "NA", "radboud")
    assert made.field("site").n_codes == 5
    assert made.field("age").n_codes == 3
    assert made.class_field is not None
    assert made.class_field.name == "class"
    assert made.to_dict()["fields"][1]["codes"] == {"01": 2, "NA": 3, "radboud": 4}


def test_an_unseen_value_is_an_error_that_names_field_value_and_closest() -> None:
    made = schema()
    with pytest.raises(UserError, match=r"'site'.*'radbound'.*closest: 'radboud'"):
        made.field("site").code("radbound")
    with pytest.raises(UserError, match=r"'site'.*'1'.*'01'"):
        made.encode(pd.DataFrame({"class": ["a"], "site": ["1"], "age": ["1"]}))
    with pytest.raises(UserError, match=r"row 1, in 2 of 3 rows"):
        made.encode(pd.DataFrame({"class": ["a"] * 3, "site": ["01", "x", "x"], "age": ["1"] * 3}))
    with pytest.raises(UserError, match=r"'sote'.*'site'"):
        made.encode([{"sote": "01"}], absent="null")
    with pytest.raises(UserError, match=r"'age'.*'old'"):
        made.field("age").code("old")
    with pytest.raises(UserError, match="finite"):
        made.field("age").code("inf")


def test_unknown_is_not_null() -> None:
    made = schema()
    codes, numbers = made.encode(
        [{"class": "a", "site": "not reported", "age": float("nan")}, {"class": "b"}], absent="null"
    )
    assert codes.tolist() == [[2, UNKNOWN, UNKNOWN], [3, NULL, NULL]]
    assert UNKNOWN != NULL
    assert numbers.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert made.decode(codes, numbers) == [{"class": "a", "site": UNKNOWN_WORD, "age": UNKNOWN_WORD}, {"class": "b"}]
    with pytest.raises(UserError, match="'site' is absent"):
        made.encode([{"class": "a", "age": 1.0}])
    with pytest.raises(UserError, match="None"):
        made.encode([{"class": "a", "site": None, "age": 1.0}])


def test_markers_of_missing_data_and_real_values_that_look_like_them() -> None:
    assert "na" not in MISSING
    assert "nan" not in MISSING
    for marker in ("", " ", "Unknown", "NOT REPORTED", "'--", "not available", float("nan"), np.float32("nan"), pd.NA):
        assert is_missing(marker), marker
    for real in ("NA", "na", "NaN", "None", "0", 0, 0.0):
        assert not is_missing(real), real
    with pytest.raises(UserError, match="'Not Reported', which means missing"):
        Field("race", "categorical", ("Not Reported",))


def test_missing_age_is_never_a_number() -> None:
    made = schema()
    age = made.field("age")
    assert age.missing == pytest.approx(0.25)
    assert age.mean == pytest.approx((40 + 60 + 80.5) / 3)
    assert len(age.quantiles) == 21
    assert age.quantiles[0] == 40
    assert age.quantiles[-1] == 80.5
    codes, numbers = made.encode(pd.DataFrame({"class": ["a"] * 3, "site": ["NA"] * 3, "age": ["60", "", "unknown"]}))
    assert codes[:, 2].tolist() == [FIRST_VALUE, UNKNOWN, UNKNOWN]
    assert numbers[0, 2] == pytest.approx((60 - age.mean) / age.std)
    assert numbers[1:, 2].tolist() == [0, 0]
    assert made.decode(codes, numbers)[0]["age"] == pytest.approx(60)
    assert numbers.dtype == np.float32
    assert codes.dtype == np.int64


def test_continuous_index_columns_and_constant_columns() -> None:
    made = schema()
    codes, _ = made.encode(pd.DataFrame({"class": ["a"] * 2, "site": ["NA"] * 2, "age": [60.0, np.nan]}))
    assert codes[:, 2].tolist() == [FIRST_VALUE, UNKNOWN]
    constant = Schema.from_table(pd.DataFrame({"mpp": ["0.5", "0.5"]}), None, continuous=["mpp"]).field("mpp")
    assert constant.std == 1.0
    assert constant.standardise(0.5) == 0.0


def test_merge_refuses_clashes_and_keeps_scaling() -> None:
    a = schema()
    b = Schema((Field("age", "continuous", mean=5, std=2, unit="years"), Field("stain", "categorical", ("he",))))
    merged = Schema.merge(a, b)
    assert merged.names == ("class", "site", "age", "stain")
    assert merged.field("age") == a.field("age")
    with pytest.raises(UserError, match="'months'"):
        Schema.merge(a, Schema((Field("age", "continuous", unit="months"),)))
    with pytest.raises(UserError, match="continuous in one and categorical"):
        Schema.merge(a, Schema((Field("age", "categorical", ("old",)),)))
    with pytest.raises(UserError, match="class is 'class' in one and 'tumour'"):
        Schema.merge(a, Schema((Field("tumour", "class", ("x",)),)))


def test_compatible_lists_every_problem() -> None:
    model = schema()
    Schema.compatible(model, model)
    Schema.compatible(model.subset(["class"]), model)
    dataset = Schema((Field("class", "class", ("a", "z")), Field("site", "categorical", ("karolinska",))))
    with pytest.raises(UserError) as caught:
        Schema.compatible(model, dataset)
    for part in ("'z'", "'karolinska'", "'age' is not in the dataset"):
        assert part in str(caught.value)


def test_bad_fields_are_refused() -> None:
    with pytest.raises(UserError, match="twice"):
        Field("c", "class", ("a", "a"))
    with pytest.raises(UserError, match="twice"):
        schema().append("site", ["NA"])
    with pytest.raises(UserError, match="blanks"):
        Field("c", "class", (" a",))
    with pytest.raises(UserError, match="Only one"):
        Schema((Field("a", "class"), Field("b", "class")))
    with pytest.raises(UserError, match=r"same name: .*'a', 'a'"):
        Schema((Field("a", "class"), Field("a", "categorical")))
    broken = schema().to_dict()
    broken["fields"][0]["codes"] = {"a": 2, "b": 2}
    with pytest.raises(UserError, match="gap"):
        Schema.from_dict(broken)
    with pytest.raises(UserError, match="version"):
        Schema.from_dict({**schema().to_dict(), "schema_version": 99})


def test_class_names_the_class_field_whatever_its_name() -> None:
    made = Schema.from_table(pd.DataFrame({"grade": ["a"], "site": ["s"]}), "grade", ["site"])
    assert made.subset(["class"]).names == ("grade",)
    assert made.named(["class", "site"]) == ["grade", "site"]
    other = Schema.from_table(pd.DataFrame({"grade": ["a"], "class": ["s"]}), "grade", ["class"])
    assert other.subset(["class"]).names == ("class",)
    with pytest.raises(UserError, match="'class'"):
        made.subset(["site"]).subset(["class"])
