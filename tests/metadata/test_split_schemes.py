from __future__ import annotations

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.metadata.published_splits import medi_split
from latent_medi.metadata.settings import SplitSettings
from latent_medi.metadata.split_schemes import choose_combinations, choose_sites, make_split
from latent_medi.metadata.splits import assert_patient_disjoint


def cohort(patients: int = 240, each: int = 2) -> pd.DataFrame:
    """Three classes at four sites, all combinations; every tenth patient has patches of two sites."""
    rows = []
    for p in range(patients):
        for i in range(each):
            moved = p % 10 == 0 and i == 1
            rows.append(
                {
                    "patient": f"p{p}",
                    "class": "abc"[p % 3],
                    "site": "wxyz"[(p // 3 + moved) % 4],
                    "race": "mn"[(p // 12) % 2],
                }
            )
    return pd.DataFrame(rows)


def test_a_held_out_combination_leaves_no_patient_behind() -> None:
    table = cohort()
    split = make_split(
        table, SplitSettings(hold_out=[{"class": "a", "site": "w"}], fractions={"train": 0.8, "val": 0.2})
    )
    asked = (table["class"] == "a") & (table["site"] == "w")
    assert set(split.column[asked]) == {"test"}
    # Patients with patches elsewhere too are held out whole.
    moved = table["patient"].isin(table.loc[asked, "patient"]) & ~asked
    assert moved.any()
    assert set(split.column[moved]) == {"test"}
    rest = split.column[~table["patient"].isin(table.loc[asked, "patient"])]
    assert set(rest) == {"train", "val"}
    assert split.recipe["held_out"] == [{"class": "a", "site": "w"}]


def test_what_is_held_out_can_be_shared_out() -> None:
    """An evaluation then has real patients of the held-out combination to learn from that it is not judged on."""
    table = cohort()
    asked = [{"class": "a", "site": "w"}, {"class": "b", "site": "x"}]
    shares = {"probe": 0.4, "test": 0.6}
    split = make_split(table, SplitSettings(hold_out=asked, fractions={"train": 1.0}, hold_out_fractions=shares))
    for values in asked:
        here = split.column[(table["class"] == values["class"]) & (table["site"] == values["site"])]
        assert set(here) == {"probe", "test"}
        assert (here == "probe").mean() == pytest.approx(0.4, abs=0.1)
    assert split.recipe["held_out_part"] == shares
    for wrong in ({"hold_out_fractions": {"train": 0.5, "test": 0.5}}, {"hold_out_part": "train"}):
        with pytest.raises(UserError, match="would go to 'train'"):
            make_split(table, SplitSettings(hold_out=asked, fractions={"train": 1.0}, **wrong))


def test_a_combination_is_shared_out_whatever_else_its_patients_have() -> None:
    """Patients of a held-out combination are divided evenly although most of their patches show something else."""
    rows = []
    for number in range(40):
        site = "w" if number < 10 else "x"
        rows += [{"patient": f"p{number}", "class": "a", "site": site}]
        # Most patches of each show one of many other combinations, by which they must not be told apart.
        rows += [{"patient": f"p{number}", "class": f"c{number}", "site": site}] * 5
    table = pd.DataFrame([*rows, *({"patient": f"q{n}", "class": "b", "site": "w"} for n in range(10))])
    asked = [{"class": "a", "site": "w"}]
    shares = {"probe": 0.5, "test": 0.5}
    chosen = SplitSettings(hold_out=asked, fractions={"train": 1.0}, hold_out_fractions=shares)
    column = make_split(table, chosen).column
    of_patient = column[(table["class"] == "a") & (table["site"] == "w")]
    assert of_patient.value_counts().to_dict() == {"probe": 5, "test": 5}


def test_fractions_of_nothing_are_refused() -> None:
    shares = {"probe": 0.5, "test": 0.5}
    with pytest.raises(UserError, match="nothing is"):
        make_split(cohort(), SplitSettings(hold_out_fractions=shares))
    with pytest.raises(UserError, match="scheme=medi has no hold_out_fractions"):
        make_split(cohort(), SplitSettings(scheme="medi", hold_out_fractions=shares, medi_fields=[]))
    with pytest.raises(UserError, match="scheme=every_fourth_site has no sites, stratify"):
        make_split(cohort(), SplitSettings(scheme="every_fourth_site", sites=["x"], stratify=["class"]))


def test_a_split_at_random_needs_no_part_of_its_own_for_what_is_held_out() -> None:
    column = make_split(cohort(), SplitSettings(fractions={"test": 0.6, "val": 0.4})).column
    assert set(column) == {"test", "val"}


def test_external_split_by_named_sites() -> None:
    table = cohort()
    split = make_split(table, SplitSettings(sites=["w"], fractions={"train": 1.0}))
    assert set(table.loc[split.column == "train", "site"]) == {"x", "y", "z"}
    assert set(split.column[table["site"] == "w"]) == {"test"}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.05, 0.6))
def test_sites_at_random_leave_every_class_to_train(seed: int, share: float) -> None:
    table = cohort()
    sites = choose_sites(table, "site", "class", share, seed)
    out = table["patient"].isin(table.loc[table["site"].isin(sites), "patient"])
    assert table.loc[out, "patient"].nunique() >= share * table["patient"].nunique()
    assert set(table.loc[~out, "class"]) == {"a", "b", "c"}
    assert sites == choose_sites(table.sample(frac=1, random_state=seed), "site", "class", share, seed)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0.1, 0.4))
def test_combinations_at_random_keep_their_margins(seed: int, share: float) -> None:
    table = cohort()
    chosen = choose_combinations(table, ["class", "site"], share, seed, thin_patients=10)
    assert len(chosen) == max(1, round(share * 12))
    split = make_split(
        table,
        SplitSettings(hold_out_fields=["class", "site"], hold_out_share=share, seed=seed, fractions={"train": 1.0}),
    )
    assert_patient_disjoint(table.assign(split=split.column), "split")
    train = table[split.column == "train"]
    for name in ("class", "site"):
        assert train.groupby(name)["patient"].nunique().min() >= 10
    for combination in chosen:
        assert not ((train["class"] == combination["class"]) & (train["site"] == combination["site"])).any()


def test_what_cannot_be_had_is_said() -> None:
    table = cohort(24)
    with pytest.raises(UserError, match="site_share"):
        choose_sites(table.assign(site=table["class"]), "site", "class", 0.5, 0)
    with pytest.raises(UserError, match="can be held out while each value keeps"):
        choose_combinations(table, ["class", "site"], 0.9, 0, thin_patients=2)
    with pytest.raises(UserError, match="none is left"):
        make_split(table, SplitSettings(sites=["w", "x", "y", "z"]))
    with pytest.raises(UserError, match="lacks column 'hospital'"):
        make_split(table, SplitSettings(site_field="hospital", sites=["w"]))
    with pytest.raises(UserError, match="No row has site = 'v'"):
        make_split(table, SplitSettings(sites=["v"]))


def test_medis_own_split_by_hand() -> None:
    # Class a: combinations in the order of their rows are w·m, x·m, x·n, y·m; ⌊0.7 · 4⌋ = 2 train. Site x is then on
    # both sides and goes to the test whole. Class b: only z·m and v·m, one of which trains.
    rows = [
        ("a", "w", "m"),
        ("a", "x", "m"),
        ("a", "x", "n"),
        ("a", "y", "m"),
        ("a", "w", "m"),
        ("b", "z", "m"),
        ("b", "v", "m"),
    ]
    table = pd.DataFrame(rows, columns=["class", "site", "race"])
    table["patient"] = [f"p{i}" for i in range(len(table))]
    found = medi_split(table, "class", "site", ["race"])
    assert found.tolist() == ["train", "test", "test", "test", "train", "train", "test"]
    with pytest.raises(UserError, match=r"has no train rows of \['b'\]"):
        medi_split(table[:6], "class", "site", ["race"])


def test_a_patient_on_two_sides_is_refused() -> None:
    # MeDi's scheme divides sites, so a patient with slides from two of them can be torn apart: never silently.
    table = pd.DataFrame({"class": ["a"] * 4, "site": list("wxyz"), "race": ["m"] * 4, "patient": ["p", "q", "r", "p"]})
    with pytest.raises(UserError, match="'p' in"):
        make_split(table, SplitSettings(scheme="medi", medi_fields=["race"]))


def test_what_is_held_out_must_still_be_made_of_things_seen() -> None:
    table = cohort()
    table.loc[table["class"] == "c", "site"] = "w"
    with pytest.raises(UserError, match=r"no training patient has .*class = 'c'"):
        make_split(table, SplitSettings(sites=["w"], fractions={"train": 1.0}))
    with pytest.raises(UserError, match=r"no training patient has .*class = 'c'"):
        make_split(table, SplitSettings(hold_out=[{"class": "c", "site": "w"}], fractions={"train": 1.0}))


def test_a_share_below_one_combination_holds_out_one() -> None:
    assert len(choose_combinations(cohort(), ["class", "site"], 0.01, 0, thin_patients=5)) == 1


def test_what_has_no_patient_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Both values occur, their combination does not: a split without a test part would be found much later."""
    table = pd.DataFrame({"patient": ["p", "q"], "class": ["a", "b"], "site": ["w", "x"]})
    parts = {"train": 0.7, "probe": 0.15, "test": 0.15}
    split = make_split(table, SplitSettings(hold_out=[{"class": "a", "site": "x"}], fractions=parts))
    assert len(split.column) == 2
    assert "No patient is a × x" in caplog.text
    assert "No patient is left for" in caplog.text


def test_too_few_test_patients_of_a_held_out_combination_are_named_at_once(caplog: pytest.LogCaptureFixture) -> None:
    rows = [(f"{c}{s}{i}", c, s) for c in "ab" for s in "xy" for i in range(12)]
    table = pd.DataFrame(rows, columns=["patient", "class", "site"])
    settings = SplitSettings(
        hold_out=[{"class": "a", "site": "x"}],
        hold_out_fractions={"probe": 0.5, "test": 0.5},
        fractions={"train": 0.7, "test": 0.3},
    )
    with caplog.at_level("WARNING"):
        make_split(table, settings)
    assert "a × x has 6 patients in test: `evaluate` needs 10" in caplog.text
