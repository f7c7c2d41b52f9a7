"""File names for any text."""

import unicodedata
from pathlib import PureWindowsPath

from hypothesis import given
from hypothesis import strategies as st

from latent_medi.shards.format.file_names import file_names

_odd = [".", "..", "a/b", "a_b", "A_B", "con", "NUL.txt", "x ", "x.", "é", "e\u0301"]
texts = st.text(max_size=12) | st.sampled_from(_odd)


@given(st.lists(texts, max_size=20))
def test_names_are_distinct_on_every_system_and_one_part_of_a_path(found):
    names = file_names(found)
    assert set(names) == set(found)
    folded = [unicodedata.normalize("NFKC", name).casefold() for name in names.values()]
    assert len(set(folded)) == len(folded)
    for name in names.values():
        assert name
        assert not set(name) & set('/\\<>:"|?*\0')
        assert name not in (".", "..")
        assert not name.endswith((".", " "))
        assert not PureWindowsPath(name).is_reserved()
        assert len(name.encode()) <= 200


def test_names_do_not_depend_on_order_and_usual_ones_stay():
    usual = ["gleason3", "St. Mary's", "Köln", "p2-009", "G3+4"]
    assert file_names(usual) == {text: text for text in usual}
    mixed = ["a/b", "a_b", "A_b", "..", "nul", "x" * 400, *usual]
    assert file_names(mixed) == file_names(mixed[::-1])
    names = file_names(mixed)
    assert names["a_b"] == "a_b" or names["A_b"] == "A_b"
    assert names["nul"] == "_nul"
