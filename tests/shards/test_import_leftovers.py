"""Images as they come: what cannot be used is named and counted, the rest is imported, and a rerun loses nothing."""

from __future__ import annotations

import os
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing import images as images_module
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import ImportSettings


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Ends a test that waits for somebody to write into a pipe."""

    def stop(*_: Any) -> None:
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def save(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)


def write(folder: Path, names: list[str], **columns: list[str]) -> Path:
    """A table of images, two per patient; the files are not made."""
    rows = {"image": names, "patient": [f"p{i // 2}" for i in range(len(names))]}
    rows |= {"class": ["ab"[i // 2 % 2] for i in range(len(names))], **columns}
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder / "table.csv"


def run(table: Path, out: Path, **changes: Any) -> PatchDataset:
    common: dict[str, Any] = {"table": str(table), "out": str(out), "patch_size": 16, "source_mpp": 0.5}
    return import_images(ImportSettings(**(common | {"patches_per_shard": 4} | changes)))


def rejected(dataset: PatchDataset) -> dict[str, str]:
    told = dataset.info["provenance"]["rejected"]
    assert told["count"] == len(told["images"])
    return {entry["image"]: entry["reason"] for entry in told["images"]}


def png_of_16_bits(path: Path, pixels: np.ndarray) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    )


def test_16_bits_are_refused_by_name_with_the_conversion(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    deep = np.random.default_rng(0).integers(0, 4096, (16, 16, 3), dtype=np.uint16)
    names = ["deep.png", "camera.tif", "two.tif", *(f"i{i}.png" for i in range(5))]
    table = write(tmp_path / "source", names)
    png_of_16_bits(tmp_path / "source" / "deep.png", deep)
    tifffile.imwrite(tmp_path / "source" / "camera.tif", deep, photometric="rgb")
    tifffile.imwrite(tmp_path / "source" / "two.tif", np.zeros((2, 16, 16, 3), np.uint8), photometric="rgb")
    for i in range(5):
        save(tmp_path / "source" / f"i{i}.png", i)
    dataset = run(table, tmp_path / "out", max_bad=0.5)
    assert rejected(dataset) == {
        "deep.png": "The image has 16 bits per channel, not RGB of 8 bits.",
        "camera.tif": "The image has 16 bits per channel, not RGB of 8 bits.",
        "two.tif": "The image holds several pictures.",
    }
    assert dataset.index["key"].tolist() == [f"i{i}" for i in range(5)]
    assert dataset.info["mpp"] == 0.5
    assert "such as deep.png, camera.tif: The image has 16 bits" in caplog.text
    assert "magick old.png -depth 8 new.png" in caplog.text
    with pytest.raises(UserError, match=r"None of the 2 images can be used, such as deep\.png.* 16 bits[\s\S]*magick"):
        run(write(tmp_path / "source", ["deep.png", "camera.tif"]), tmp_path / "none")


def test_a_pyramid_is_one_picture(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    table = write(tmp_path / "source", ["a.tif"])
    with tifffile.TiffWriter(tmp_path / "source" / "a.tif") as file:
        file.write(pixels, photometric="rgb")
        file.write(pixels[::2, ::2], photometric="rgb", subfiletype=1)
    assert np.array_equal(run(table, tmp_path / "out").read([0])[0], pixels)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("first", [True, False])
def test_a_pipe_or_a_folder_is_named_and_nobody_waits(tmp_path: Path, first: bool) -> None:
    names = ["i0.png", "i1.png", "i2.png", "i3.png"]
    odd = ["pipe.png", "folder.png", "device.png"]
    table = write(tmp_path / "source", odd + names if first else names + odd)
    for i, name in enumerate(names):
        save(tmp_path / "source" / name, i)
    os.mkfifo(tmp_path / "source" / "pipe.png")
    (tmp_path / "source" / "folder.png").mkdir()
    (tmp_path / "source" / "device.png").symlink_to("/dev/zero")
    assert rejected(run(table, tmp_path / "out", max_bad=0.5)) == {
        "pipe.png": "is a pipe or device, not a file",
        "folder.png": "is a folder",
        "device.png": "is a pipe or device, not a file",
    }


def test_links_are_followed_and_dangling_ones_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(4):
        save(tmp_path / "store" / "a" / f"p{i}_1.png", i)
        save(tmp_path / "store2" / f"q{i}_1.png", 10 + i)
    (tmp_path / "imgs" / "b").mkdir(parents=True)
    (tmp_path / "imgs" / "a").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "store" / "a" / "back").symlink_to(tmp_path / "imgs")
    for i in range(4):
        (tmp_path / "imgs" / "b" / f"q{i}_1.png").symlink_to(tmp_path / "store2" / f"q{i}_1.png")
    (tmp_path / "imgs" / "b" / "._q0_1.png").write_bytes(b"\0\5\x16\7" + bytes(4092))
    words = [
        "shards",
        "images",
        f"folder={tmp_path / 'imgs'}",
        f"out={tmp_path / 'out'}",
        "patch_size=16",
        "source_mpp=0.5",
        r"pattern=(?P<class>[^/]+)/(?P<patient>[^/_]+)_[0-9]+\.png",
    ]
    assert main(words) == 0
    assert PatchDataset.open(tmp_path / "out").index.groupby("class").size().to_dict() == {"a": 4, "b": 4}
    (tmp_path / "imgs" / "b" / "q9_1.png").symlink_to(tmp_path / "gone.png")
    for _ in range(2):  # a rerun says it again
        capsys.readouterr()
        assert main(words) == 3
        told = capsys.readouterr()
        assert "8 patches of 8 patients" in told.out
        assert "1 image rejected" in told.out
        assert "1 of 9 images were left out" in told.err
        assert "b/q9_1.png: cannot be used: a link to" in told.err
    (tmp_path / "imgs" / "b" / "q9_1.png").unlink()
    assert main(words) == 0
    assert rejected(PatchDataset.open(tmp_path / "out")) == {}


LONG = "TCGA-OR-A5J1-01Z-00-DX1." + "x" * 100 + ".png"


def test_names_that_cannot_be_used_are_counted_and_the_rest_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    names = ["i0.png", "i1.png", LONG, "trailing .png", "..dots.png", "a b (1) [HE].png", "bell\a.png"]
    table = write(tmp_path / "source", names)
    for i, name in enumerate(names):
        save(tmp_path / "source" / name, i)
    with open(table, "a") as file:
        file.write(",p0,a\n")
    words = ["shards", "images", f"table={table}", f"out={tmp_path / 'out'}", "patch_size=16", "source_mpp=0.5"]
    assert main(words) == 3
    error = capsys.readouterr().err
    dataset = PatchDataset.open(tmp_path / "out")
    assert dataset.index["key"].tolist() == ["i0", "i1", "trailing", "--dots", "a b (1) [HE]"]
    assert list(rejected(dataset)) == [LONG, repr("bell\a.png"), "row 8"]
    assert "is too long, 124 bytes" in rejected(dataset)[LONG]
    assert rejected(dataset)["row 8"] == "names no image"
    assert "3 of 8 images were left out" in error
    assert "key_column=…" in caplog.text
    assert main([*words, "max_bad=0.5"]) == 0
    assert dataset.verify(images=True) == []


def test_keys_are_checked_before_a_shard_is_written(tmp_path: Path) -> None:
    names = [f"{'画' * 40}{i}.png" for i in range(3)]
    table = write(tmp_path / "source", names, short=["a", "b", "c"])
    for name in names:
        save(tmp_path / "source" / name)
    with pytest.raises(UserError, match=r"none of its 3 images can be used[\s\S]*key_column=…"):
        run(table, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(table, tmp_path / "out", key_column="short").index["key"].tolist() == ["a", "b", "c"]


def test_a_patient_without_a_usable_image_is_in_no_split(tmp_path: Path) -> None:
    names = ["i0.png", "i1.png", LONG]
    table = write(tmp_path / "source", names, part=["train", "train", "test"])
    for name in names:
        save(tmp_path / "source" / name)
    dataset = run(table, tmp_path / "out", split_column="part")
    assert dataset.index["split_main"].tolist() == ["train", "train"]
    assert dataset.schema.field("class").values == ("a",)  # no value of an image that is not there


def test_paths_of_other_systems_and_places(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = [f"i{i}.png" for i in range(4)]
    for i, name in enumerate(files):
        save(tmp_path / "source" / "img" / name, i)
    source = tmp_path / "source"
    assert len(run(write(source, [f"img\\{name}" for name in files]), tmp_path / "win")) == 4
    assert PatchDataset.open(tmp_path / "win").index["key"].tolist()[0] == "img/i0"
    for names, reason, remedy in (
        ([f"D:\\study\\img\\{name}" for name in files], "is a path of a Windows drive", f"root=… .now {source}"),
        ([f"\\\\server\\img\\{name}" for name in files], "is a path of a Windows drive", "root=…"),
        ([f"img/{name.upper()}" for name in files], r"is spelled otherwise: the file is 'i0\.png'", "also their case"),
        ([f"/mnt/old/{name}" for name in files], "is not there any more", "root=…"),
        ([f"img2/{name}" for name in files], "No such file or directory", f"relative to root=…, now {source}"),
    ):
        with pytest.raises(UserError, match=rf"None of the 4 images can be read, such as [\s\S]*{reason}") as caught:
            run(write(source, names), tmp_path / "none")
        assert pd.Series([str(caught.value)]).str.contains(remedy, regex=True).all()
        assert not (tmp_path / "none").exists()
    mixed = run(write(source, ["img/i0.png", "img/I1.png", "img/i2.png"]), tmp_path / "mixed", max_bad=0.5)
    assert rejected(mixed) == {"img/I1.png": "is spelled otherwise: the file is 'i1.png'"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source_mpp": 0.00025}, r"source_mpp, is 0\.00025; it is in µm per pixel[\s\S]*in mm.*0\.25 µm"),
        ({"source_mpp": 250.0}, r"source_mpp, is 250; it is in µm per pixel[\s\S]*in nm.*0\.25 µm"),
        ({"mpp": 0.0005}, r"mpp, is 0\.0005"),
        ({"mpp": 500.0}, r"mpp, is 500"),
        ({"source_mpp_column": "mpp"}, r"'i1\.png', in column 'mpp', is 0\.00025"),
    ],
)
def test_a_resolution_in_another_unit_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    table = write(tmp_path / "source", ["i0.png", "i1.png"], mpp=["0.25", "0.00025"])
    save(tmp_path / "source" / "i0.png")
    save(tmp_path / "source" / "i1.png")
    with pytest.raises(UserError, match=words):
        run(table, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def imported(tmp_path: Path) -> tuple[Path, Callable[..., PatchDataset]]:
    """The output folder of an import with two splits, and the import to run again."""
    names = [f"i{i}.png" for i in range(8)]
    for i, name in enumerate([*names, "new.png"]):
        save(tmp_path / "source" / name, i)
    out = tmp_path / "out"

    def again(names: list[str] = names, classes: str = "aabbaabb", **changes: Any) -> PatchDataset:
        table = write(tmp_path / "source", names, **{"class": [*classes][: len(names)]})
        return run(table, out, **changes)

    dataset = again()
    part = dict(zip(("p0", "p1", "p2", "p3"), ("train", "train", "test", "val"), strict=True))
    for name in ("main", "second"):
        dataset.add_split(name, [part[p] for p in dataset.index["patient"]], {"kind": "by hand"})
    return out, again


PARTS = ["train"] * 4 + ["test"] * 2 + ["val"] * 2


def test_a_rerun_keeps_splits_by_patient(
    imported: tuple[Path, Callable[..., PatchDataset]], caplog: pytest.LogCaptureFixture
) -> None:
    out, again = imported
    before = (out / "dataset.json").read_bytes()
    assert again().index["split_main"].tolist() == PARTS
    assert (out / "dataset.json").read_bytes() == before
    changed = again(codec="jpg")
    assert changed.splits == ["main", "second"]
    assert changed.index["split_second"].tolist() == PARTS
    assert changed.info["splits"]["main"]["recipe"] == {"kind": "by hand"}
    assert changed.verify() == []
    more = again([f"i{i}.png" for i in range(8)] + ["new.png"], "aabbaabba")
    assert more.index["split_main"].tolist() == [*PARTS, ""]
    assert "1 new patients are in no part of the split 'main'" in caplog.text
    assert again([f"i{i}.png" for i in range(6)]).index["split_main"].tolist() == PARTS[:6]


def test_a_rerun_that_is_cut_off_keeps_splits_too(
    imported: tuple[Path, Callable[..., PatchDataset]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, again = imported
    for stop in ("write_shard", "finish_dataset"):
        monkeypatch.setattr(images_module, stop, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            again(codec="jpg")
        monkeypatch.undo()
    assert again(codec="jpg").index["split_main"].tolist() == PARTS


def test_a_rerun_that_would_lose_something_is_refused_by_name(
    imported: tuple[Path, Callable[..., PatchDataset]],
) -> None:
    out, again = imported
    before = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"the splits main, second, .*fields that have changed.*1 patients, such as p2"):
        again(classes="aabbbbbb")
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    PatchDataset.open(out).add_selection("best", {"": np.arange(8) < 3}, {}, {})
    before = {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=r"has the selections best[\s\S]*another folder"):
        again(codec="jpg")
    assert again().selections.keys() == {"best"}
    assert {p.name: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_images_that_are_out_of_reach_do_not_end_a_finished_dataset(tmp_path: Path) -> None:
    names = [f"i{i}.png" for i in range(6)]
    for i, name in enumerate(names):
        save(tmp_path / "src" / name, i)
    table = write(tmp_path / "src", names)
    run(table, tmp_path / "out", mpp=0.5)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "src").rename(tmp_path / "unmounted")
    with pytest.raises(UserError, match=r"6 of 6 images do not exist, such as i0\.png; .*out is not changed"):
        run(tmp_path / "unmounted" / "table.csv", tmp_path / "out", mpp=0.5, root=str(tmp_path / "src"))
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_an_image_under_two_paths_is_taken_once_by_the_path_without_a_link(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(3):
        save(tmp_path / "img" / "tumour" / f"p{i}_1.png", i)
        save(tmp_path / "img" / "normal" / f"q{i}_1.png", 10 + i)
    (tmp_path / "img" / "latest").symlink_to(tmp_path / "img" / "tumour")
    (tmp_path / "img" / "normal" / "a0_1.png").symlink_to(tmp_path / "img" / "tumour" / "p0_1.png")
    pattern = r"(?P<class>[^/]+)/(?P<patient>[^/_]+)_[0-9]+\.png"
    words = {"folder": str(tmp_path / "img"), "pattern": pattern, "out": str(tmp_path / "out"), "patch_size": 16}
    made = import_images(ImportSettings(**words, source_mpp=0.5))
    assert made.index.groupby("class").size().to_dict() == {"normal": 3, "tumour": 3}
    assert "img/latest is the folder" in caplog.text
    assert "normal/a0_1.png is the same file as" in caplog.text


def test_columns_that_do_not_go_along_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A hospital that is forgotten here is missed after the training."""
    names = [f"i{i}.png" for i in range(4)]
    for i, name in enumerate(names):
        save(tmp_path / "t" / name, i)
    table = write(tmp_path / "t", names, hospital=list("aabb"))
    caplog.set_level("INFO")
    assert run(table, tmp_path / "out", class_field="class").schema.names == ("class",)
    assert "not taken are the columns hospital." in caplog.text
    caplog.clear()
    assert run(table, tmp_path / "all", class_field="class", categorical=["hospital"]).schema.names[1:] == ("hospital",)
    assert "not taken" not in caplog.text
