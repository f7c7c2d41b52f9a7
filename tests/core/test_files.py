"""Files that carry the checksum of their content, and files that are none."""

import json
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.core.files import (
    atomic_path,
    check_file,
    check_output,
    read_json,
    read_object,
    read_sealed,
    refuse_foreign,
    set_aside,
    write_sealed,
    write_text,
)

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


def test_a_flipped_bit_in_the_name_of_the_seal_is_no_file_of_an_earlier_version(tmp_path):
    path = tmp_path / "a.json"
    write_sealed(path, {"images": 80, "made by": "sha256:0"})
    whole = path.read_bytes()
    at = whole.index(b'"seal"')
    for place in range(8 * at, 8 * (at + 6)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"a\.json"):
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


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_what_is_written_follows_the_umask(tmp_path, mask, mode):
    """Whatever the library that writes the file thinks of it."""
    before = os.umask(mask)
    try:
        for name in ("file", "folder"):
            with atomic_path(tmp_path / name) as temporary:
                if name == "folder":
                    temporary.mkdir(0o700)
                inside = temporary / "part" if name == "folder" else temporary
                os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o600))
        assert (tmp_path / "file").stat().st_mode & 0o777 == mode
        assert (tmp_path / "folder" / "part").stat().st_mode & 0o777 == mode
        assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o777 & ~mask
    finally:
        os.umask(before)


def test_a_file_never_replaces_a_folder_nor_a_folder_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    with (
        pytest.raises(UserError, match="file is a file; a folder is written there"),
        atomic_path(tmp_path / "file") as t,
    ):
        t.mkdir()
    with pytest.raises(UserError, match="folder is a folder; a file is written there"):
        write_text(tmp_path / "folder", "new")
    with (
        pytest.raises(UserError, match="folder would be replaced, and mine in it"),
        atomic_path(tmp_path / "folder") as t,
    ):
        t.mkdir()
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "folder" / "mine").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]  # no temporary one either
    with atomic_path(tmp_path / "folder") as temporary:  # a successor of all that it holds
        temporary.mkdir()
        (temporary / "mine").write_text("newer")
    assert (tmp_path / "folder" / "mine").read_text() == "newer"


def test_a_link_is_followed_not_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "plan.csv").write_text("old")
    (tmp_path / "plan.csv").symlink_to(tmp_path / "disk" / "plan.csv")
    write_text(tmp_path / "plan.csv", "new")
    assert (tmp_path / "plan.csv").is_symlink()
    assert (tmp_path / "disk" / "plan.csv").read_text() == "new"


def test_outputs_that_cannot_be_written_are_one_message(tmp_path):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "dangling", "is a link to .*nowhere, which does not exist"),
        (tmp_path / "dangling" / "out", "is a link to .*nowhere, which does not exist"),
        (tmp_path / "file" / "out", "file is a file"),
        (tmp_path / "pipe", "is not a regular file"),
        ("", "No path to write"),
    ):
        with pytest.raises(UserError, match=why):
            check_output(path)
        if path:
            with pytest.raises(UserError, match=why):
                write_text(path, "x")
    with pytest.raises(UserError, match="is a file; a folder is written there"):
        check_output(tmp_path / "file", folder=True)
    with pytest.raises(UserError, match="is a folder; a file is written there"):
        check_output(tmp_path, folder=False)


def test_a_read_only_folder_is_one_message(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "closed").mkdir(mode=0o555)
    code = (
        "import os, sys; from latent_medi.core.files import write_text; from latent_medi.core.errors import UserError\n"
        "if os.getuid() == 0:\n    os.setuid(65534)\n"  # to whom everything is allowed
        "try:\n    write_text(sys.argv[1], 'x')\nexcept UserError as error:\n    print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "closed/a"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "closed/a cannot be written: " in done.stdout, done.stderr
    assert not done.stderr


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    (tmp_path / "a.png").write_text("my notes")
    (tmp_path / "b.png").write_bytes(b"\x89PNG and so on")
    (tmp_path / "c.png").touch()
    with pytest.raises(UserError, match=r"a\.png exists and is no picture"):
        check_file(tmp_path / "a.png", "picture", rb"\x89PNG")
    for name in ("b.png", "c.png", "d.png"):
        check_file(tmp_path / name, "picture", rb"\x89PNG")


def test_a_folder_of_the_users_is_refused_an_own_or_damaged_one_not(tmp_path):
    signs, written = {"info.json": "ours", ".progress": ""}, ["info.json", "data/part-*.tar"]
    refuse_foreign(tmp_path / "absent", signs, written)
    (tmp_path / "notes.txt").write_text("mine")
    refuse_foreign(tmp_path, signs, written)
    (tmp_path / "info.json").write_text('{"theirs": 1}')
    with pytest.raises(UserError, match=r"info\.json exists and was not written by this command"):
        refuse_foreign(tmp_path, signs, written)
    for text in ('{"ours": 1}', '{"ours'):
        (tmp_path / "info.json").write_text(text)
        refuse_foreign(tmp_path, signs, written)
    (tmp_path / "info.json").unlink()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part-000000.tar").touch()
    with pytest.raises(UserError, match=r"part-000000\.tar exists"):
        refuse_foreign(tmp_path, signs, written)
    (tmp_path / ".progress").mkdir()
    refuse_foreign(tmp_path, signs, written)


def test_a_folder_that_lost_its_name_in_a_kill_gets_it_back(tmp_path):
    """A folder is replaced by two renames; a process killed between them leaves its name to nobody."""
    (tmp_path / ".tmp-old-123-model").mkdir()
    (tmp_path / ".tmp-old-123-model" / "weights").write_text("old")
    (tmp_path / ".tmp-old-123-model" / "notes").write_text("mine")
    (tmp_path / ".tmp-old-12-other-model").mkdir()
    lost = pytest.raises(UserError, match="replaced, and notes in it would be lost")
    with lost, atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("new")
    assert (tmp_path / "model" / "weights").read_text() == "old"
    (tmp_path / "model" / "notes").unlink()
    with atomic_path(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "weights").write_text("new")
    assert (tmp_path / "model" / "weights").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".tmp-old-12-other-model"}


def test_what_is_damaged_is_kept_under_another_name(tmp_path):
    for content in ("a", "b"):
        (tmp_path / "x.json").write_text(content)
        set_aside(tmp_path / "x.json")
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"x.json.damaged": "a", "x.json.damaged-2": "b"}
