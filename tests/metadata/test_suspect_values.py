"""What a person may have spelled twice, or written for missing."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from latent_medi.metadata.fields import MISSING
from latent_medi.metadata.suspect_values import looks_missing, plain_spelling, spelled_alike


@given(st.text(max_size=10))
def test_case_unicode_form_and_blanks_are_one_spelling(value):
    for other in (unicodedata.normalize("NFD", value), unicodedata.normalize("NFC", value), f"\u00a0{value}  "):
        assert plain_spelling(other) == plain_spelling(value)
    assert plain_spelling(plain_spelling(value)) == plain_spelling(value)


def test_groups_are_sorted_and_hold_what_differs_in_spelling_only():
    assert spelled_alike(["b", "B", "a", "c  d", "C d", "e"]) == [["B", "b"], ["C d", "c  d"]]
    assert spelled_alike(["G3", "G4", "pT1a", "01", "1"]) == []


def test_words_for_missing():
    words = ["nan", "None", "N/A", "NULL", "not applicable", "[Not Applicable]", "Not Allowed To Collect", "-", "?"]
    assert all(looks_missing(word) for word in [*words, ".", "#N/A", "(none)", "NA", "[Discrepancy]"])
    assert not any(looks_missing(word) for word in ["white", "AN", "0", "normal", "no", "3+", "Nantes", "x"])
    assert all(looks_missing(word) or word in MISSING for word in MISSING)
