"""Files that carry the checksum of their content, and files that are none."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_medi.errors import UserError
from latent_medi.files import read_json, read_object, read_sealed, write_sealed

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(max_size=6).filter(lambda key: key != "seal"), values, max_size=4))
def test_what_was_sealed_is_read_back(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("sealed") / "a.json"
    write_sealed(path, value)
    assert read_sealed(path, "Write it again.") == (value, True)


def test_a_changed_value_is_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, {"images": 80, "classes": ["a", "b"]})
    path.write_text(path.read_text().replace("80", "88"))
    with pytest.raises(UserError, match=r"a\.json is damaged.*\n.*Write it again"):
        read_sealed(path, "Write it again.")


def test_a_file_of_an_earlier_version_has_no_seal(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"images": 80}))
    assert read_sealed(path, "Write it again.") == ({"images": 80}, False)


def test_deep_nesting_pipes_folders_and_other_types_are_one_message(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(UserError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")
    for name in ("pipe.json", "folder.json"):
        with pytest.raises(UserError, match="is not a file"):
            read_json(tmp_path / name)
    with pytest.raises(UserError, match="holds a JSON list, not an object"):
        read_object(tmp_path / "list.json")
