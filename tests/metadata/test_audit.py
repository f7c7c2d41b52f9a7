from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.metadata.association import class_separation, cramers_v, repeats_class
from latent_medi.metadata.audit import audit
from latent_medi.metadata.audit_text import audit_text
from latent_medi.metadata.estimability import Verdicts, verdict
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
    table = index({("a", "x"): 30, ("a", "y"): 30, ("b", "y"): 30, ("c", "z"): 20, ("b", "w"): 3})
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
    assert verdict(table, {"class": "a", "site": "x"})["patients"] == 30
    assert verdict(table, {"class": "a", "site": "x"})["patches"] == 60
    # Along the chain b, y, a, x: 1/(1/30 + 1/30 + 1/30) patients.
    assert verdict(table, {"class": "b", "site": "x"})["effective_patients"] == pytest.approx(10)
    assert verdict(table, {"class": "a", "site": "x"})["effective_patients"] is None
    never = verdict(table, {"class": "a", "site": "q"})
    assert (never["verdict"], never["patients"]) == ("unidentifiable", 0)


def test_a_combination_that_hangs_on_one_bridging_patient_is_thin() -> None:
    table = index({("a", "x"): 20, ("a", "y"): 1, ("b", "y"): 20})
    found = verdict(table, {"class": "b", "site": "x"})
    assert found["verdict"] == "thin"
    assert found["effective_patients"] == pytest.approx(1 / (1 / 20 + 1 + 1 / 20))
    assert "rests on 0.9 effective patients, fewer than 10" in found["reason"]
    # A second way, over class c, counts as well: 10/11 + 1/(1/30 + 1/30 + 1/30).
    table = index({("a", "x"): 20, ("a", "y"): 1, ("b", "y"): 20, ("c", "x"): 30, ("c", "z"): 30, ("b", "z"): 30})
    found = verdict(table, {"class": "b", "site": "x"})
    assert found["verdict"] == "both margins seen"
    assert found["effective_patients"] == pytest.approx(10 / 11 + 10)


def test_no_combination_is_seen_without_a_patch_whatever_is_called_thin() -> None:
    table = index({("a", "x"): 1, ("a", "y"): 1, ("b", "y"): 1})
    assert verdict(table, {"class": "b", "site": "x"}, thin_patients=0)["verdict"] == "both margins seen"


def test_three_fields_that_only_occur_together_are_unidentifiable() -> None:
    names = ("class", "site", "stain")
    # At each site one stain: class and site are seen in every pair, site and stain never apart.
    seen = {("a", "x", "1"): 20, ("b", "x", "1"): 20, ("a", "y", "2"): 20, ("b", "y", "2"): 20}
    table = index(seen, names)
    asked = {"class": "a", "site": "x", "stain": "2"}
    assert verdict(table, asked)["verdict"] == "unidentifiable"
    bridged = index({**seen, ("a", "y", "1"): 60}, names)
    found = verdict(bridged, asked, thin_patients=8)
    assert found["verdict"] == "both margins seen"
    assert found["effective_patients"] == pytest.approx(additive_model(bridged, names)(*asked.values()))


def test_pairwise_linked_but_not_estimable_is_found() -> None:
    # Each pair of fields is linked throughout, but three patient groups cannot tell three effects apart.
    seen = {("a", "x", "1"): 20, ("a", "y", "2"): 20, ("b", "y", "1"): 20}
    names = ("class", "site", "stain")
    asked = {"class": "b", "site": "x", "stain": "2"}
    found = verdict(index(seen, names), asked)
    assert found["verdict"] == "unidentifiable"
    assert "only occur together" in found["reason"]
    linked = index({**seen, ("b", "x", "1"): 60}, names)
    assert verdict(linked, asked)["verdict"] == "thin"
    assert verdict(linked, asked, thin_patients=2)["verdict"] == "both margins seen"


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


def people(*columns: np.ndarray) -> pd.DataFrame:
    """A patch of each patient with the fields class, site, …"""
    numbers = [f"p{i}" for i in range(len(columns[0]))]
    given = dict(zip(("class", "site", "age"), columns, strict=False))
    return pd.DataFrame({"key": numbers, "patient": numbers, "slide": numbers, **given})


def test_association_is_corrected_for_its_bias() -> None:
    # χ² = 12.8 of 3 × 2 values and 40 patients, by hand: φ² = 0.32 − 2/39, of at most (2 − 1/39) − 1.
    table = index({("a", "x"): 12, ("a", "y"): 4, ("b", "x"): 4, ("b", "y"): 12, ("c", "x"): 4, ("c", "y"): 4})
    chi = sum((n - e) ** 2 / e for n, e in ((12, 8), (4, 8), (4, 8), (12, 8), (4, 4), (4, 4)))
    by_hand = ((chi / 40 - 2 / 39) / (1 - 1 / 39)) ** 0.5
    assert cramers_v(table, "class", "site") == pytest.approx(by_hand)
    # Independent fields of 5 and 20 values over 40 patients: 0.65 without the correction.
    rng = np.random.default_rng(0)
    drawn = [
        cramers_v(people(rng.integers(0, 5, 40).astype(str), rng.integers(0, 20, 40).astype(str)), "class", "site")
        for _ in range(100)
    ]
    assert np.mean(drawn) < 0.15
    assert cramers_v(index({("a", "x"): 9, ("b", "y"): 5, ("c", "z"): 2}), "class", "site") == pytest.approx(1)
    each = np.arange(12).astype(str)  # every patient has a class and a site of its own
    assert cramers_v(people(each, each), "class", "site") is None


def test_a_field_that_repeats_the_class_is_named() -> None:
    pairs = {"both": "ax by cz", "field": "aw ax by cz", "class": "ax bx cz", "": "ax ay by cz"}
    for word, seen in pairs.items():
        table = index(dict.fromkeys(seen.split(), 15))
        assert repeats_class(table, "class", "site") == word, seen
    table = index({("a", "x", "1"): 15, ("a", "y", "1"): 15, ("b", "x", "2"): 15}, ("class", "site", "code"))
    result = audit(table, schema_of(table, ("code",)))
    assert result["repeats_class"] == {"code": "both"}
    assert "code repeats the class (each class has its own code)" in audit_text(result)
    assert "Leave code out." in audit_text(result)
    assert repeats_class(index({("a", "x"): 4, ("b", "y"): 4}), "class", "site") == ""  # too few to say so
    many = np.arange(60).astype(str)  # a value per patient determines the class by chance alone
    assert repeats_class(people(many.astype(int) % 2 == 0, many), "class", "site") == ""


def test_a_field_that_repeats_another_one_is_named() -> None:
    cells = {(c, s, {"x": "A", "y": "B", "z": "B"}[s], s.upper()): 15 for c in "ab" for s in "xyz"}
    table = index(cells, ("class", "site", "scanner", "tss"))
    found = [line for line in audit(table, schema_of(table, ("scanner", "tss")))["advice"] if "repeats" in line]
    assert found == [
        "scanner repeats site (each site has one scanner): no model can separate their effects. Leave scanner out."
    ]
    table = index({(*c[:3], {"A": "old", "B": "new"}[c[2]]): 15 for c in cells}, ("class", "site", "scanner", "era"))
    found = audit(table.assign(site="one"), schema_of(table, ("scanner", "era")))["advice"]
    assert [line[: line.index(":")] for line in found if "repeats" in line] == [
        "era repeats scanner (each scanner has one era)"
    ]


def test_a_continuous_field_that_separates_two_classes_is_named() -> None:
    rng = np.random.default_rng(0)
    classes = np.repeat(["a", "b", "c", "d"], [30, 20, 40, 5])
    age = rng.normal(50, 10, 95).round()
    age[:30] += 15
    table = people(classes, np.tile(["x", "y"], 48)[:95], age)
    found = class_separation(table, "class", "age")
    wins = (age[:30, None] > age[30:50]).mean() + (age[:30, None] == age[30:50]).mean() / 2
    assert 0.7 < wins < 0.9
    pairs = {c: wins if c == "b" else None for c in "bc"}
    pairs["c"] = (age[:30, None] > age[50:90]).mean() + (age[:30, None] == age[50:90]).mean() / 2
    best = max(pairs, key=pairs.get)
    assert found == {
        "classes": ["a", best],
        "auroc": pytest.approx(pairs[best]),
        "patients": [30, {"b": 20}.get(best, 40)],
    }
    schema = Schema.from_table(table, "class", ["site"], ["age"])
    assert "separates" not in audit_text(audit(table, schema))
    table.loc[classes == "a", "age"] += 15
    assert "age separates a from" in audit_text(audit(table, schema))
    # A patient of many patches counts once.
    heavy = pd.concat([table, *[table[table["patient"] == "p0"]] * 500])
    assert class_separation(heavy, "class", "age") == class_separation(table, "class", "age")
    assert class_separation(table[:40], "class", "age")["patients"] == [30, 10]
    assert class_separation(table[:39], "class", "age") is None


def test_a_patient_at_several_sites_is_told_once() -> None:
    table = index({("a", "x"): 12, ("b", "y"): 12, ("a", "unknown"): 1})
    apart = audit(table, schema_of(table))
    assert apart["shared_patients"] == {"count": 0, "examples": []}
    assert "at several" not in audit_text(apart)
    numbers = table["patient"].str.partition("p")[2]  # each hospital begins at 0
    result = audit(table.assign(patient=numbers), schema_of(table))
    assert result["shared_patients"]["count"] == 12
    assert result["shared_patients"]["examples"][0] == {"patient": "0", "sites": ["x", "y"]}
    assert "12 patients with patches at several sites, such as '0' at x, y." in audit_text(result)
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


def test_site_codes_are_no_words_for_missing() -> None:
    table = index({("a", "05"): 12, ("b", "NA"): 12}).rename(columns={"site": "tss"}).assign(site=["x", "y"] * 24)
    schema = Schema.from_table(table, "class", ["site", "tss"])
    result = audit(table, schema, site_field="tss")
    assert result["looks_missing"] == {}
    assert "audit again with site_field=site" in audit_text(result)
    words = table.assign(tss=table["tss"].replace("05", "east"))
    assert audit(words, Schema.from_table(words, "class", ["tss"]), site_field="tss")["looks_missing"] == {
        "tss": {"NA": 24}
    }


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


def additive_model(table: pd.DataFrame, names: tuple[str, ...]) -> Callable[..., float | None]:
    """1/(x(X'X)⁺x') with numpy, a row of X for each patient and combination; None if x is not in X's row space."""
    people = table.drop_duplicates(["patient", *names])
    levels = [(name, value) for name in names for value in sorted(set(people[name]))]
    design = np.array([people[name].to_numpy() == value for name, value in levels], float).T
    inverse = np.linalg.pinv(design.T @ design, hermitian=True)
    projection = inverse @ design.T @ design

    def effective(*values: str) -> float | None:
        x = np.array([values[names.index(name)] == value for name, value in levels], float)
        return float(1 / (x @ inverse @ x)) if np.allclose(x @ projection, x) else None

    return effective


FIELDS = {"class": "abcd", "site": "xyz", "stain": "123", "scanner": "mw"}
CELLS = st.integers(1, 4).flatmap(
    lambda k: st.dictionaries(
        st.tuples(*map(st.sampled_from, [*FIELDS.values()][:k])), st.integers(1, 12), min_size=1, max_size=9
    )
)


@settings(max_examples=60, deadline=None)
@given(CELLS)
def test_effective_patients_are_those_of_the_additive_model(cells: dict[tuple[str, ...], int]) -> None:
    names = (*FIELDS,)[: len(next(iter(cells)))]
    table = index(cells, names, each=1)
    verdicts, by_hand = Verdicts(table, 3), additive_model(table, names)
    people = {name: table[name].value_counts() for name in names}
    for values in itertools.product(*(sorted({cell[i] for cell in cells}) for i in range(len(names)))):
        found, wanted = verdicts(dict(zip(names, values, strict=True))), by_hand(*values)
        if values in cells:
            assert found["verdict"] == ("seen" if cells[values] >= 3 else "thin")
        elif wanted is None:
            assert (found["verdict"], found["effective_patients"]) == ("unidentifiable", None)
        else:
            assert found["effective_patients"] == pytest.approx(wanted)
            assert found["verdict"] == ("thin" if wanted < 3 - 1e-6 else "both margins seen")
            assert wanted <= min(people[n][v] for n, v in zip(names, values, strict=True)) + 1e-6


@settings(max_examples=60, deadline=None)
@given(CELLS)
def test_what_can_be_held_out_is_judged_as_if_it_were(cells: dict[tuple[str, ...], int]) -> None:
    names = (*FIELDS,)[: len(next(iter(cells)))]
    found = Verdicts(index(cells, names, each=1), 3).held_out_candidates(names)
    assert {tuple(f["combination"].values()): f["patients"] for f in found} == cells
    for entry in found:
        values = tuple(entry["combination"].values())
        rest = {other: count for other, count in cells.items() if other != values}
        if rest:
            without = Verdicts(index(rest, names, each=1), 3)(entry["combination"])
            assert entry["effective_patients"] == pytest.approx(without["effective_patients"] or 0, abs=1e-6)
            assert entry["enough"] == (cells[values] >= 3 and without["verdict"] == "both margins seen")
        else:
            assert not entry["enough"]
    ready = [f["patients"] for f in found if f["enough"]]
    assert [f["patients"] for f in found][: len(ready)] == sorted(ready, reverse=True)


def test_the_audit_names_what_to_hold_out() -> None:
    table = index({("a", "x"): 40, ("a", "y"): 30, ("b", "x"): 25, ("b", "y"): 5})
    lines = audit_text(audit(table, schema_of(table))).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("no combination can be held out"))
    assert lines[at + 1] == "  b × y: 5 patients; without them it rests on 10.16 effective ones"
    table = index({("a", "x"): 40, ("a", "y"): 30, ("b", "x"): 30, ("b", "y"): 30})
    lines = audit_text(audit(table, schema_of(table))).splitlines()
    at = lines.index("4 combinations can be held out as a test of unseen ones:")
    assert lines[at + 1] == "  a × x: 40 patients; without them it rests on 10 effective ones"
    assert lines[at + 4] == "  … and 1 more"


def test_values_seen_beside_unknown_ones_alone_are_unidentifiable() -> None:
    table = index({("a", "x"): 20, ("b", "unknown"): 20, ("c", "x"): 20, ("c", "y"): 20})
    assert verdict(table, {"class": "b", "site": "x"})["verdict"] == "unidentifiable"


def test_thousands_of_values_are_judged_in_a_matrix_of_the_smaller_field() -> None:
    rng = np.random.default_rng(0)
    patients = range(20_000)
    table = pd.DataFrame({"patient": patients, "key": patients, "slide": patients})
    table["class"] = [f"c{i}" for i in rng.integers(0, 30, 20_000)]
    table["site"] = [f"s{i}" for i in rng.integers(0, 3_000, 20_000)]
    verdicts = Verdicts(table, 10)
    asked = [{"class": f"c{i % 30}", "site": f"s{i}"} for i in range(3_000)]
    words = Counter(entry["verdict"] for entry in map(verdicts, asked))
    assert set(words) == {"thin", "both margins seen"}
    seen = {(row["class"], row["site"]) for row in table.to_dict("records")}
    for combination in [c for c in asked if tuple(c.values()) not in seen][:3]:
        # Every class has some 700 patients: the site's own are what the combination rests on, less a little.
        own = int((table["site"] == combination["site"]).sum())
        assert 0.9 * own < verdicts(combination)["effective_patients"] < own
