"""Training sets in which class and site are tied more and more: of one size, nested, with every margin seen."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.metadata.association_levels import association, patients_by_level, rotating_targets
from latent_medi.metadata.estimability import verdict


def people(counts: dict[tuple[str, str], int]) -> pd.DataFrame:
    return pd.DataFrame(
        [{"patient": f"{c}-{s}-{i}", "class": c, "site": s} for (c, s), n in counts.items() for i in range(n)]
    )


EVEN = people({(c, s): 12 for c in "abc" for s in ("NA", "x", "y", "z")})


def test_by_hand() -> None:
    targets = rotating_targets(EVEN, "class", "site")
    assert targets == [{"class": c, "site": s} for c, s in zip("abca", ("NA", "x", "y", "z"), strict=True)]
    levels = patients_by_level(EVEN, "class", "site", targets, [0.0, 0.5, 1.0])
    # Class a lacks two of its four sites at level 1: the other two give 24, which every level then has.
    for level, a_target, a_other in zip(levels, (6, 4, 0), (6, 8, 12), strict=True):
        table = EVEN[EVEN["patient"].isin(level)].groupby(["class", "site"]).size()
        assert table.groupby("class").sum().to_dict() == {"a": 24, "b": 36, "c": 36}
        assert table.get(("a", "NA"), 0) == table.get(("a", "z"), 0) == a_target
        assert table["a", "x"] == table["a", "y"] == a_other
        assert table.get(("b", "x"), 0) == {6: 9, 4: 5, 0: 0}[a_target]
    ties = [association(EVEN[EVEN["patient"].isin(level)], "class", "site") for level in levels]
    assert ties[0] == pytest.approx(0.0, abs=1e-12)
    assert ties == sorted(ties)
    assert ties[2] > 0.35
    assert association(people({("a", "x"): 5, ("b", "y"): 5}), "class", "site") == pytest.approx(1.0)


def verdicts(table: pd.DataFrame, targets: list[dict[str, str]]) -> set[str]:
    left = table.assign(key=table["patient"], slide=table["patient"])
    for target in targets:
        left = left[(left["class"] != target["class"]) | (left["site"] != target["site"])]
    return {verdict(left, target, thin_patients=0)["verdict"] for target in targets}


@pytest.mark.parametrize("sites", ["xy", "xyz", "vwxyz"])
@pytest.mark.parametrize("rotation", [0, 1])
def test_of_two_classes_a_site_keeps_both(sites: str, rotation: int) -> None:
    table = people({(c, s): 3 for c in "ab" for s in sites})
    targets = rotating_targets(table, "class", "site", rotation)
    assert len(targets) == len(sites) - 1
    assert verdicts(table, targets) == {"both margins seen"}


def test_what_is_withheld_twice_per_site_stays_linked() -> None:
    table = people({(c, s): 3 for c in "abc" for s in "xyz"})
    targets = rotating_targets(table, "class", "site", per_site=2)
    assert len(targets) == 4  # of nine; five link three classes and three sites
    assert verdicts(table, targets) == {"both margins seen"}


def test_every_combination_is_a_target_once() -> None:
    found = [tuple(t.values()) for r in range(3) for t in rotating_targets(EVEN, "class", "site", r)]
    assert sorted(found) == sorted((c, s) for c in "abc" for s in ("NA", "x", "y", "z"))


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.tuples(st.sampled_from("abcd"), st.sampled_from("wxyz")), st.integers(1, 30), min_size=4, max_size=16
    ),
    st.integers(0, 3),
    st.lists(st.floats(0, 1), min_size=1, max_size=4),
    st.integers(0, 9),
)
def test_whatever_the_cohort(counts: dict[tuple[str, str], int], rotation: int, levels: list[float], seed: int) -> None:
    table = people(counts)
    try:
        targets = rotating_targets(table, "class", "site", rotation)
    except UserError:
        return
    assert verdicts(table, targets) == {"both margins seen"}
    levels = sorted([*levels, 1.0])
    found = patients_by_level(table, "class", "site", targets, levels, seed)
    withheld = {(t["class"], t["site"]) for t in targets}
    tables = [table[table["patient"].isin(patients)] for patients in found]
    sizes = [part.groupby("class").size().to_dict() for part in tables]
    assert all(size == sizes[0] for size in sizes)
    assert not {(c, s) for c, s in zip(tables[-1]["class"], tables[-1]["site"], strict=True)} & withheld
    for less, more in itertools.pairwise(tables):
        kept = {key: set(rows["patient"]) for key, rows in less.groupby(["class", "site"])}
        for key, rows in more.groupby(["class", "site"]):
            mine, before = set(rows["patient"]), kept.get(key, set())
            assert mine <= before or before <= mine
    again = patients_by_level(table.sample(frac=1, random_state=1), "class", "site", targets, levels, seed)
    assert again == found


def test_bad_input() -> None:
    targets = rotating_targets(EVEN, "class", "site")
    with pytest.raises(UserError, match=r"not 1\.2"):
        patients_by_level(EVEN, "class", "site", targets, [1.2])
    with pytest.raises(UserError, match="No patient has the target a × nowhere"):
        patients_by_level(EVEN, "class", "site", [{"class": "a", "site": "nowhere"}], [1.0])
    with pytest.raises(UserError, match="no site would be seen"):
        rotating_targets(EVEN, "class", "site", per_site=3)
    with pytest.raises(UserError, match="No combination of class and site can be withheld"):
        rotating_targets(people({("a", "x"): 4, ("b", "x"): 4, ("b", "y"): 4}), "class", "site")
    both = pd.concat([EVEN, pd.DataFrame([{"patient": "a-x-0", "class": "b", "site": "x"}])])
    with pytest.raises(UserError, match="'a-x-0' has two classes or sites"):
        patients_by_level(both, "class", "site", targets, [1.0])
    one = people({("a", "x"): 4, ("b", "x"): 4, ("b", "y"): 4})
    with pytest.raises(UserError, match="Every site of 'a' is a target"):
        patients_by_level(one, "class", "site", [{"class": "a", "site": "x"}], [1.0])
