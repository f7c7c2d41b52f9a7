"""Conditions, their embedding, and condition dropout."""

from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import (
    Conditions,
    MetadataConditioner,
    default_widths,
    draw_dropout,
    fourier_features,
)
from latent_medi.diffusion.settings import DropoutSettings
from latent_medi.metadata.schema import NULL, UNKNOWN, Field, Schema

ROWS = [
    {"grade": "gleason4", "site": "radboud", "gender": "male", "age": 65.0},
    {"grade": "benign", "site": "karolinska", "gender": "unknown", "age": "unknown"},
]


def make_schema(metadata: int) -> Schema:
    fields = [Field("grade", "class", ("a", "b"))] + [
        Field(f"m{i}", "categorical", ("x", "y")) for i in range(metadata)
    ]
    return Schema(tuple(fields))


def test_conditions_are_null_where_nothing_is_given(schema):
    conditions = Conditions.from_schema(schema, [{"grade": "gleason4"}])
    assert conditions.codes.tolist() == [[schema.field("grade").code("gleason4"), NULL, NULL, NULL]]
    with pytest.raises(UserError, match="gleason4"):
        Conditions.from_schema(schema, [{"grade": "gleason5"}])
    with pytest.raises(UserError):
        Conditions.from_schema(schema, [{"grade": "gleason4"}], absent="error")


def test_conditions_are_selected_masked_and_joined(schema):
    conditions = Conditions.from_schema(schema, ROWS)
    for which in (slice(1, 2), torch.tensor([1]), np.array([1]), [1]):
        assert conditions.rows(which).codes.tolist() == conditions.codes[1:].tolist()
    kept = conditions.masked(torch.tensor([True, False, True, False]))
    assert kept.codes[:, 1].tolist() == [NULL, NULL]
    assert kept.codes[:, 0].tolist() == conditions.codes[:, 0].tolist()
    assert kept.values.abs().max() == 0
    assert conditions.values.abs().max() > 0
    assert conditions.null_like().codes.abs().max() == 0
    assert len(Conditions.cat([conditions, kept])) == 4


@pytest.mark.parametrize(("metadata", "expected"), [(0, [512]), (1, [256] * 2), (3, [128] * 4), (4, [104] + [102] * 4)])
def test_widths_are_equal_parts_with_the_remainder_to_the_class(metadata, expected):
    assert list(default_widths(make_schema(metadata), 512).values()) == expected


@given(metadata=st.integers(0, 9), quarter=st.integers(4, 300))
@settings(max_examples=50, deadline=None)
def test_widths_follow_the_formula(metadata, quarter):
    widths = default_widths(make_schema(metadata), 4 * quarter)
    each = 4 * quarter // (1 + metadata)
    assert widths.pop("grade") == each + 4 * quarter - each * (1 + metadata)
    assert set(widths.values()) <= {each}


def test_vectors_are_the_tables_rows_in_order_with_the_class_first(schema):
    conditioner = MetadataConditioner(schema.to_dict(), 64)
    conditions = Conditions.from_schema(schema, ROWS)
    z = conditioner(conditions)
    e = conditioner.embeddings
    age = e["field_age"]
    expected = [
        e["field_grade"].codes.weight[conditions.codes[0, 0]],
        e["field_site"].codes.weight[conditions.codes[0, 1]],
        e["field_gender"].codes.weight[conditions.codes[0, 2]],
        age.value(fourier_features(conditions.values[:, 3]))[0],
    ]
    assert torch.equal(z[0], torch.cat(expected))
    assert torch.equal(z[1, -16:], age.codes.weight[UNKNOWN])
    assert torch.equal(conditioner(conditions.null_like())[0, -16:], age.codes.weight[NULL])
    assert not torch.equal(age.codes.weight[UNKNOWN], age.codes.weight[NULL])


def test_class_comes_first_even_if_the_schema_lists_it_last():
    mixed = Schema((Field("site", "categorical", ("x",)), Field("grade", "class", ("a",))))
    assert list(MetadataConditioner(mixed.to_dict(), 32).embeddings) == ["field_grade", "field_site"]


def test_a_continuous_value_changes_the_vector_smoothly(schema):
    conditioner = MetadataConditioner(schema.to_dict(), 64)
    ages = torch.linspace(-2, 2, 401)
    codes = Conditions.from_schema(schema, ROWS[:1]).repeat(401)
    values = codes.values.clone()
    values[:, 3] = ages
    vectors = conditioner(Conditions(codes.codes, values))
    steps = (vectors[1:] - vectors[:-1]).norm(dim=1)
    assert steps.min() > 0
    assert (vectors[0] - vectors[-1]).norm() > 5 * steps.max()


@pytest.mark.parametrize("fusion", ["concat", "additive", "linear"])
def test_zero_init_is_exactly_zero_and_still_learns(schema, fusion):
    conditioner = MetadataConditioner(schema.to_dict(), 64, fusion=fusion)
    conditions = Conditions.from_schema(schema, ROWS)
    assert conditioner(conditions).abs().min() >= 0
    assert conditioner(conditions).shape == (2, 64)
    conditioner.zero_init()
    for c in (conditions, conditions.null_like()):
        assert torch.equal(conditioner(c), torch.zeros(2, 64))
    torch.nn.functional.mse_loss(conditioner(conditions), torch.ones(2, 64)).backward()
    torch.optim.SGD(conditioner.parameters(), 1.0).step()
    assert conditioner(conditions).abs().max() > 0


def test_fusions_are_what_they_say(schema):
    conditions = Conditions.from_schema(schema, ROWS)
    for fusion in ("additive", "linear"):
        conditioner = MetadataConditioner(schema.to_dict(), 32, fusion=fusion)
        parts = [
            m(conditions.codes[:, i], conditions.values[:, i]) for i, m in enumerate(conditioner.embeddings.values())
        ]
        expected = sum(parts) if fusion == "additive" else conditioner.mix(torch.cat(parts, 1))
        torch.testing.assert_close(conditioner(conditions), expected)


def test_widths_that_do_not_fit_are_refused(schema):
    for widths in ({"grade": 32, "site": 16, "gender": 8, "age": 9}, {"grade": 32, "site": 32}):
        with pytest.raises(UserError, match="sum to 64"):
            MetadataConditioner(schema.to_dict(), 64, widths=widths)
    chosen = MetadataConditioner(schema.to_dict(), 64, widths={"site": 16, "grade": 32, "gender": 8, "age": 8})
    assert chosen.embeddings["field_grade"].codes.weight.shape[1] == 32
    with pytest.raises(UserError, match="no field 'sites'"):
        MetadataConditioner(schema.to_dict(), 64, fields=["grade", "sites"])


def test_appended_values_leave_old_vectors_alone(schema, tmp_path):
    conditioner = MetadataConditioner(schema.to_dict(), 64)
    conditions = Conditions.from_schema(schema, ROWS)
    before = conditioner(conditions).detach().clone()
    conditioner.append("site", ["aachen"])
    assert torch.equal(conditioner(conditions), before)
    assert conditioner.schema.field("site").values == ("karolinska", "radboud", "aachen")
    table = conditioner.embeddings["field_site"].codes.weight
    assert torch.equal(table[4], table[2:4].mean(0))
    conditioner.save_pretrained(tmp_path)
    loaded = MetadataConditioner.from_pretrained(tmp_path)
    assert loaded.schema == conditioner.schema
    with pytest.raises(UserError):
        conditioner.append("age", ["old"])


@pytest.mark.parametrize("fusion", ["concat", "additive", "linear"])
def test_round_trip_keeps_vectors_schema_and_patterns(schema, tmp_path, fusion):
    patterns = {"keep_all": 0.5, "all_null": 0.5, "metadata_null": 0.0, "independent": 0.0, "independent_rate": 0.5}
    conditioner = MetadataConditioner(
        schema.to_dict(), 64, fields=["grade", "age"], fusion=fusion, dropout_patterns=patterns
    )
    conditioner.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    loaded = MetadataConditioner.from_pretrained(tmp_path)
    assert loaded.schema == schema.subset(["grade", "age"])
    assert loaded.patterns == DropoutSettings(0.5, 0.5, 0.0, 0.0)
    conditions = Conditions.from_schema(loaded.schema, [{"grade": "benign", "age": 58}])
    assert torch.equal(loaded(conditions), conditioner(conditions))


def test_field_names_that_a_module_container_cannot_hold():
    odd = Schema(
        (Field("class", "class", ("a",)), Field("keys", "categorical", ("b",)), Field("a.b", "categorical", ("c",)))
    )
    assert MetadataConditioner(odd.to_dict(), 33)(Conditions.from_schema(odd, [{"keys": "b"}])).shape == (1, 33)


def drawn(schema: Schema, dropout: DropoutSettings, count: int = 40_000) -> np.ndarray:
    full = Conditions.from_schema(schema, ROWS[:1]).repeat(count)
    dropped = draw_dropout(full, dropout, torch.Generator().manual_seed(0), schema)
    kept = dropped.codes != NULL
    assert torch.equal(dropped.codes[kept], full.codes[kept])
    assert (dropped.values[~kept] == 0).all()
    return kept.numpy()


@pytest.mark.parametrize(
    "dropout",
    [
        DropoutSettings(),
        DropoutSettings(0.25, 0.05, 0.2, 0.5, 0.3),
        DropoutSettings(0.0, 0.0, 0.0, 1.0, 0.8),
        DropoutSettings(0.6, 0.4, 0.0, 0.0),
        DropoutSettings(0.0, 0.0, 0.9, 0.1, 1.0),
    ],
    ids=["default", "mixed", "independent", "classifier-free", "never"],
)
def test_every_subset_of_fields_is_as_frequent_as_the_settings_say(schema, dropout):
    """The joint frequency of each of the 2⁴ subsets of kept fields, not of each field alone."""
    kept = drawn(schema, dropout)
    observed = Counter(map(tuple, kept.tolist()))
    total = 0.0
    for subset in product((True, False), repeat=4):
        dropped = 4 - sum(subset)
        share = dropout.independent * dropout.independent_rate**dropped * (1 - dropout.independent_rate) ** sum(subset)
        share += dropout.keep_all * (subset == (True,) * 4)
        share += dropout.all_null * (subset == (False,) * 4)
        share += dropout.metadata_null * (subset == (True, False, False, False))
        total += share
        frequency = observed[subset] / len(kept)
        assert abs(frequency - share) <= 5 * np.sqrt(share * (1 - share) / len(kept)), subset  # 0 is never
    assert total == pytest.approx(1)


def test_the_pattern_is_drawn_for_each_sample_not_for_the_batch(schema):
    kept = drawn(schema, DropoutSettings(0.5, 0.5, 0.0, 0.0), 400)
    assert 100 < kept[:, 0].sum() < 300
    assert (kept == kept[:, :1]).all()  # all fields of a sample together


def test_independent_dropout_is_independent(schema):
    kept = drawn(schema, DropoutSettings(0.0, 0.0, 0.0, 1.0, 0.3))
    assert np.allclose(kept.mean(0), 0.7, atol=0.02)
    assert np.abs(np.corrcoef(kept.T) - np.eye(4)).max() < 0.03


def test_shares_of_zero_never_occur_and_are_a_distribution(schema):
    assert drawn(schema, DropoutSettings(1.0, 0.0, 0.0, 0.0)).all()
    with pytest.raises(UserError, match="sum to 1"):
        drawn(schema, DropoutSettings(0.9), 1)
    with pytest.raises(UserError, match=r"keep_all is 1\.2"):
        DropoutSettings(1.2, -0.2, 0.0, 0.0)


def test_dropout_is_reproducible_from_its_generator(schema):
    assert np.array_equal(drawn(schema, DropoutSettings(), 100), drawn(schema, DropoutSettings(), 100))
