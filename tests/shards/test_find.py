from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latent_medi.core.errors import UserError
from latent_medi.shards.importing.find_files import find_files


def names(folder: Path, paths: list[Path]) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in paths]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for name in ("b.tif", "a.TIF", "sub/c.tiff", "notes.txt"):
        (root / name).write_bytes(b"x")
    return root


def test_files_behind_links_are_found_and_loops_end(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (tmp_path / "store" / "deep" / "far.tif").write_bytes(b"x")
    (tree / "linked").symlink_to(tmp_path / "store")
    (tree / "link.tif").symlink_to(tree / "b.tif")
    (tree / "self").symlink_to(tree)
    (tree / "sub" / "up").symlink_to("..")
    (tmp_path / "store" / "back").symlink_to(tree)  # a loop through two folders
    found = find_files(tree, (".tif", ".tiff"))
    assert names(tree, found.files) == ["a.TIF", "b.tif", "link.tif", "linked/deep/far.tif", "sub/c.tiff"]
    assert found.left_out == []


def test_a_folder_behind_several_links_is_searched_once(
    tree: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store" / "deep").mkdir(parents=True)
    (tmp_path / "store" / "deep" / "far.tif").write_bytes(b"x")
    (tree / "one").symlink_to(tmp_path / "store")
    (tree / "two").symlink_to(tmp_path / "store" / "deep")
    (tree / "latest").symlink_to("sub")  # before sub in order, but sub is the path without a link
    found = find_files(tree, (".tif", ".tiff"))
    assert names(tree, found.files) == ["a.TIF", "b.tif", "one/deep/far.tif", "sub/c.tiff"]
    assert f"{tree}/latest is the folder {tree}/sub again" in caplog.text
    assert f"{tree}/two is the folder {tree}/one/deep again" in caplog.text


def test_folders_that_are_all_linked_to_each_other_are_searched_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / "store" / f"f{number}" for number in range(40)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / f"{folder.name}.tif").write_bytes(b"x")
        for other in folders:
            (folder / f"to-{other.name}").symlink_to(other)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "start").symlink_to(folders[0])
    found = find_files(tmp_path / "root", (".tif",))  # by every path, it would not end
    assert sorted(path.name for path in found.files) == sorted(f"{folder.name}.tif" for folder in folders)


def test_what_is_no_file_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "gone.tif").symlink_to("/nowhere/gone.tif")
    (tree / "class").symlink_to("/nowhere/class")
    (tree / "batch1.2").symlink_to("/nowhere/batch")
    (tree / "other.txt").symlink_to("/nowhere/other")
    (tree / "round.tif").symlink_to("round.tif")
    os.mkfifo(tree / "pipe.tif")
    (tree / "device.tif").symlink_to("/dev/zero")
    monkeypatch.chdir(tree)  # a socket's path has about 100 bytes at most
    with socket.socket(socket.AF_UNIX) as there:
        there.bind("socket.tif")
        found = find_files(tree, (".tif",))
    told = {path.name: why for path, why in found.left_out}
    assert told["gone.tif"] == "a link to /nowhere/gone.tif, which is not there or out of reach"
    assert told["class"] == "a link to /nowhere/class, which is not there or out of reach"
    assert told["pipe.tif"] == "a pipe, not a file"
    assert told["socket.tif"] == "a socket, not a file"
    assert told["device.tif"] == "a device, not a file"
    assert set(told) == {"gone.tif", "class", "batch1.2", "round.tif", "pipe.tif", "device.tif", "socket.tif"}
    assert names(tree, found.files) == ["a.TIF", "b.tif"]


def test_hidden_files_are_counted_and_left_alone(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tree / "._b.tif").write_bytes(b"\0\5\x16\7")
    (tree / ".DS_Store").write_bytes(b"x")
    (tree / ".snapshot").mkdir()
    (tree / ".snapshot" / "old.tif").write_bytes(b"x")
    with caplog.at_level(logging.INFO):
        found = find_files(tree, (".tif",))
    assert names(tree, found.files) == ["a.TIF", "b.tif"]
    assert found.left_out == []
    assert "2 hidden files and folders in" in caplog.text
    assert ".snapshot" in caplog.text
    # What is asked for by name is searched.
    assert len(find_files(tree / ".snapshot", (".tif",)).files) == 1


def test_names_that_are_not_text_are_left_out_in_print(tree: Path) -> None:
    bad = os.fsencode(tree) + b"/\xff\xfe.tif"
    Path(os.fsdecode(bad)).write_bytes(b"x")
    os.mkdir(os.fsencode(tree) + b"/f\xe9")
    found = find_files(tree, (".tif",))
    assert len(found.files) == 2
    assert {why for _, why in found.left_out} == {"its name is not UTF-8: rename it"}
    assert [str(path).encode() for path, _ in found.left_out]
    assert len(found.left_out) == 2


def test_a_folder_that_may_not_be_searched(tree: Path) -> None:
    (tree / "secret").mkdir()
    (tree / "secret").chmod(0)
    root = os.geteuid() == 0
    own = next((path for path in tree.parents if path.name.startswith("pytest-of-")), tree)  # closed by pytest
    for path in (tree, *(path for path in tree.parents if path == own or own in path.parents)):
        path.chmod(0o755)
    if root:
        os.seteuid(65534)
    try:
        if not os.access(tree, os.R_OK, effective_ids=True):
            pytest.skip("the temporary folder is closed to others")
        found = find_files(tree, (".tif",))
    finally:
        if root:
            os.seteuid(0)
        (tree / "secret").chmod(0o755)
    assert [(path.name, why) for path, why in found.left_out] == [
        ("secret", "the folder cannot be searched: Permission denied")
    ]
    with pytest.raises(UserError, match="cannot be searched: No such file"):
        find_files(tree / "none", (".tif",))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(links=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=6))
def test_any_links_between_folders_end_and_each_file_is_found_once(
    tmp_path_factory: pytest.TempPathFactory, links: list[tuple[int, int]]
) -> None:
    root = tmp_path_factory.mktemp("links")
    for number in range(4):
        (root / f"f{number}").mkdir()
        (root / f"f{number}" / f"{number}.tif").write_bytes(b"x")
    for k, (here, there) in enumerate(links):
        (root / f"f{here}" / f"l{k}").symlink_to(root / f"f{there}")
    found = find_files(root, (".tif",))
    # Each file once, by the path without a link.
    assert names(root, found.files) == [f"f{number}/{number}.tif" for number in range(4)]
