from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from latent_medi.core.errors import UserError
from latent_medi.metadata.audit import audit, cramers_v
from latent_medi.metadata.audit_text import audit_text
from latent_medi.metadata.estimability import verdict
from latent_medi.metadata.schema import Schema


def index(cells: dict[tuple[str, ...], int], names: tuple[str, ...] = ("class", "site"), each: int = 2) -> pd.DataFrame:
    rows = []
    for number, (values, patients) in enumerate(cells.items()):
        for p in range(patients):
            for i in range(each):
                patient = f"c{number}p{p}"
                rows.append(
                    {
                        "key": f"{patient}-{i}",
                        "patient": patient,
                        "slide": patient,
                        **dict(zip(names, values, strict=True)),
                    }
                )
    return pd.DataFrame(rows)


def schema_of(table: pd.DataFrame, extra: tuple[str, ...] = ()) -> Schema:
    return Schema.from_table(table, "class", ["site", *extra])


def test_all_four_verdicts() -> None:
    # a and b share hospital y; c is only seen alone at z.
    table = index({("a", "x"): 20, ("a", "y"): 20, ("b", "y"): 20, ("c", "z"): 20, ("b", "w"): 3})
    words = {
        ("a", "x"): "seen",
        ("b", "x"): "both margins seen",
        ("b", "w"): "thin",
        ("a", "w"): "thin",
        ("a", "z"): "unidentifiable",
        ("c", "x"): "unidentifiable",
    }
    for (tumour, site), word in words.items():
        found = verdict(table, {"class": tumour, "site": site})
        assert found["verdict"] == word, found
    assert "no chain" in verdict(table, {"class": "c", "site": "x"})["reason"]
    assert verdict(table, {"class": "a", "site": "x"})["patients"] == 20
    assert verdict(table, {"class": "a", "site": "x"})["patches"] == 40
    never = verdict(table, {"class": "a", "site": "q"})
    assert (never["verdict"], never["patients"]) == ("unidentifiable", 0)


def test_three_fields_that_only_occur_together_are_unidentifiable() -> None:
    names = ("class", "site", "stain")
    # At each site one stain: class and site are seen in every pair, site and stain never apart.
    seen = {("a", "x", "1"): 20, ("b", "x", "1"): 20, ("a", "y", "2"): 20, ("b", "y", "2"): 20}
    table = index(seen, names)
    asked = {"class": "a", "site": "x", "stain": "2"}
    assert verdict(table, asked)["verdict"] == "unidentifiable"
    bridged = index({**seen, ("a", "y", "1"): 20}, names)
    assert verdict(bridged, asked)["verdict"] == "both margins seen"


def test_pairwise_linked_but_not_estimable_is_found() -> None:
    # Each pair of fields is linked throughout, but three patient groups cannot tell three effects apart.
    seen = {("a", "x", "1"): 20, ("a", "y", "2"): 20, ("b", "y", "1"): 20}
    names = ("class", "site", "stain")
    asked = {"class": "b", "site": "x", "stain": "2"}
    found = verdict(index(seen, names), asked)
    assert found["verdict"] == "unidentifiable"
    assert "only occur together" in found["reason"]
    assert verdict(index({**seen, ("b", "x", "1"): 20}, names), asked)["verdict"] == "both margins seen"


def test_the_whole_audit_is_json_and_counts_patients_once() -> None:
    table = index({("a", "x"): 12, ("b", "y"): 11}, each=5)
    table["split_main"] = "train"
    table.loc[table["class"] == "b", "split_main"] = "test"
    schema = schema_of(table)
    result = audit(table, schema)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result["counts"] == {"patches": 115, "slides": 23, "patients": 23}
    assert result["margins"]["site"]["y"] == {"patches": 55, "slides": 11, "patients": 11}
    assert result["cramers_v"]["site"] == pytest.approx(1.0)
    assert [(c["classes"], c["sites"]) for c in result["groups"]] == [(["a"], ["x"]), (["b"], ["y"])]
    assert result["verdict_counts"] == {"seen": 2, "both margins seen": 0, "thin": 0, "unidentifiable": 2}
    assert "2 separate groups" in audit_text(result)
    train = audit(table, schema, split=("main", "train"))
    assert train["counts"]["patients"] == 12
    assert train["margins"]["class"]["b"]["patients"] == 0
    with pytest.raises(UserError, match="no split 'mian'"):
        audit(table, schema, split=("mian", "train"))
    with pytest.raises(UserError, match=r"there is main\.\n.*latent-medi split"):
        audit(table, schema, split=("mian", "train"))
    with pytest.raises(UserError, match=r"(?s)split_main = val.*test, train"):
        audit(table, schema, split=("main", "val"))
    with pytest.raises(UserError, match="no split 'main'"):
        audit(table.drop(columns="split_main"), schema, split=("main", "train"))


def test_requested_combinations_and_unknown_values() -> None:
    table = index({("a", "x"): 12, ("b", "y"): 12, ("b", "unknown"): 5})
    schema = schema_of(table)
    result = audit(table, schema, requested=[{"site": "y"}, {"class": "a"}])
    assert [v["verdict"] for v in result["verdicts"]] == ["seen", "seen"]
    assert result["missing"]["site"] == pytest.approx(5 / 29)
    assert set(result["margins"]["site"]) == {"x", "y"}
    with pytest.raises(UserError, match="'sites'"):
        audit(table, schema, requested=[{"sites": "y"}])
    with pytest.raises(UserError, match="'yy'"):
        audit(table, schema, requested=[{"site": "yy"}])


def test_independent_fields_have_no_association() -> None:
    table = index({(c, s): 10 for c in "ab" for s in "xyz"})
    assert cramers_v(table, "class", "site") == pytest.approx(0.0, abs=1e-9)
    table["constant"] = "k"
    assert cramers_v(table, "class", "constant") is None
    assert len(audit(table, schema_of(table))["groups"]) == 1


def test_a_patient_at_several_sites_is_told_once() -> None:
    table = index({("a", "x"): 12, ("b", "y"): 12, ("a", "unknown"): 1})
    apart = audit(table, schema_of(table))
    assert apart["shared_patients"] == {"count": 0, "examples": []}
    assert "at several" not in audit_text(apart)
    numbers = table["patient"].str.partition("p")[2]  # each hospital begins at 0
    result = audit(table.assign(patient=numbers), schema_of(table))
    assert result["shared_patients"]["count"] == 12
    assert result["shared_patients"]["examples"][0] == {"patient": "0", "sites": ["x", "y"]}
    assert "12 patients have patches at several sites, such as '0' at x, y." in audit_text(result)
    assert "(x-0)" in result["advice"][0]


def test_values_that_may_be_one_or_may_mean_missing_are_asked_about() -> None:
    cells = {("Tumor", "St. Mary"): 3, ("tumor", "St.  Mary"): 3, ("Normal", "Köln"): 3, ("Normal", "Ko\u0308ln"): 3}
    table = index(cells).assign(race=(["white", "NA", "nan", "[Not Applicable]"] * 6)[:24])
    table.loc[table["patient"] == "c0p0", "patient"] = "C1P0"  # a patient in two spellings
    result = audit(table, schema_of(table, ("race",)))
    assert result["spelled_alike"] == {
        "patient": [{"C1P0": 2, "c1p0": 2}],
        "class": [{"Tumor": 6, "tumor": 6}],
        "site": [{"Ko\u0308ln": 6, "Köln": 6}, {"St.  Mary": 6, "St. Mary": 6}],
    }
    assert result["looks_missing"] == {"race": {"NA": 6, "[Not Applicable]": 6, "nan": 6}}
    text = audit_text(result)
    assert "Is this one class, spelled in several ways? 'Tumor' (6) / 'tumor' (6)." in text
    assert "Does this mean missing in race? 'NA' (6), '[Not Applicable]' (6), 'nan' (6)." in text
    clean = index({("a", "x"): 12, ("b", "x"): 12, ("a", "y"): 12})
    found = audit(clean, schema_of(clean))
    assert found["spelled_alike"] == found["looks_missing"] == {}
    assert "?" not in audit_text(found)


def test_words_for_missing_are_refused_alike_as_numbers() -> None:
    for word in ("nan", "NaN", "NA", "n/a", "None"):
        table = pd.DataFrame({"age": ["61", word, ""]})
        with pytest.raises(UserError, match=f"'{word}' is not a number.\n  If it means missing, write unknown"):
            Schema.from_table(table, None, [], ["age"])
    assert Schema.from_table(pd.DataFrame({"age": [61.0, float("nan")]}), None, [], ["age"]).field("age").missing == 0.5


def test_the_number_of_combinations_is_bounded() -> None:
    rows = range(6000)
    table = pd.DataFrame({"key": rows, "slide": rows, "patient": [f"p{i}" for i in rows]})
    table["class"], table["site"] = [f"c{i % 1000}" for i in rows], [f"s{i * 7 % 900}" for i in rows]
    with pytest.raises(UserError, match="class × site has 900000 combinations; the most is 200000"):
        audit(table, schema_of(table))
    asked = audit(table, schema_of(table), [{"class": "c1", "site": "s7"}, {"class": "c1", "site": "s8"}])
    assert [entry["verdict"] for entry in asked["verdicts"]] == ["thin", "unidentifiable"]
    table["class"], table["site"] = [f"c{i % 3000}" for i in rows], [f"s{i * 7 % 2900}" for i in rows]
    with pytest.raises(UserError, match="class has 3000 values and site 2900"):
        audit(table, schema_of(table), [])


def test_two_fields_are_told_apart_as_the_additive_model_says() -> None:
    """Connected components against the rank of the design matrix."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        seen = {(f"c{a}", f"s{b}"): 12 for a, b in rng.integers(0, 6, (8, 2))}
        table = index(seen, each=1)
        levels = sorted({("class", a) for a, _ in seen} | {("site", b) for _, b in seen})
        design = np.array([[level in (("class", a), ("site", b)) for level in levels] for a, b in seen], float)
        for a in {a for a, _ in seen}:
            for b in {b for _, b in seen}:
                wanted = np.array([[level in (("class", a), ("site", b)) for level in levels]], float)
                estimable = np.linalg.matrix_rank(np.vstack([design, wanted])) == np.linalg.matrix_rank(design)
                assert (verdict(table, {"class": a, "site": b})["verdict"] != "unidentifiable") == estimable
