from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import ImportSettings


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        name = f"im.{i:02d}.png"
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"image": name, "patient": f"p{i // 2}", "class": "ab"[i % 2], "site": "NA", "mpp": "0.5"})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder


def run(source: Path, out: Path, **changes: Any) -> PatchDataset:
    settings = {
        "table": str(source / "table.csv"),
        "out": str(out),
        "categorical": ["site"],
        "patch_size": 16,
        "source_mpp": 0.5,
    }
    return import_images(ImportSettings(**(settings | {"patches_per_shard": 5} | changes)))


def test_images_are_scaled_down_whole(source: Path, tmp_path: Path) -> None:
    dataset = run(source, tmp_path / "out")
    assert dataset.info["mpp"] == 1.0
    assert dataset.index["key"].tolist() == [f"im-{i:02d}" for i in range(12)]
    assert (dataset.index["x"] == -1).all()
    assert dataset.index["slide"].tolist() == dataset.index["patient"].tolist()
    assert dataset.index["site"].tolist() == ["NA"] * 12
    expected = Image.open(source / "im.00.png").resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(dataset.read([0])[0], np.asarray(expected))
    assert dataset.info["provenance"]["rejected"] == {"count": 0, "images": []}


def test_same_size_keeps_every_pixel_and_a_given_mpp_cuts_the_middle(source: Path, tmp_path: Path) -> None:
    original = np.asarray(Image.open(source / "im.03.png"))
    same = run(source, tmp_path / "same", patch_size=32)
    assert np.array_equal(same.read([3])[0], original)
    cut = run(source, tmp_path / "cut", patch_size=16, mpp=0.5)
    assert np.array_equal(cut.read([3])[0], original[8:24, 8:24])


def test_resolution_is_never_assumed_and_never_enlarged(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resolution of the images is not given"):
        run(source, tmp_path / "a", source_mpp=0.0)
    with pytest.raises(UserError, match=r"12 of 12 images are bad[\s\S]*im\.00\.png.*enlarged"):
        run(source, tmp_path / "b", mpp=0.25)
    with pytest.raises(UserError, match=r"covers 16 µm, and a patch 32 µm"):
        run(source, tmp_path / "c", mpp=2.0)
    table = pd.read_csv(source / "table.csv", dtype=str)
    table.loc[4, "mpp"] = "0.25"
    table.to_csv(source / "table.csv", index=False)
    mixed = run(source, tmp_path / "d", source_mpp_column="mpp", max_bad=0.2)
    assert [r["image"] for r in mixed.info["provenance"]["rejected"]["images"]] == ["im.04.png"]
    table.loc[4, "mpp"] = ""
    table.to_csv(source / "table.csv", index=False)
    with pytest.raises(UserError, match=r"im\.04\.png.*resolution ''"):
        run(source, tmp_path / "e", source_mpp_column="mpp")


def damage(source: Path) -> None:
    data = (source / "im.01.png").read_bytes()
    (source / "im.01.png").write_bytes(data[: len(data) // 2])
    Image.new("L", (32, 32)).save(source / "im.06.png")
    (source / "im.07.png").unlink()
    Image.new("RGB", (40, 32)).save(source / "im.11.png")


def test_each_bad_image_is_named_and_none_is_replaced(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(source)
    with pytest.raises(UserError, match="4 of 12 images are bad") as caught:
        run(source, tmp_path / "out")
    assert not (tmp_path / "out/dataset.json").exists()
    assert caplog.text == ""  # the error says it all
    dataset = run(source, tmp_path / "out", max_bad=0.5)
    for name in ("im.01.png", "im.06.png", "im.07.png", "im.11.png"):
        assert name in str(caught.value)
        assert f"rejected {name}" in caplog.text
    assert dataset.index["key"].tolist() == [f"im-{i:02d}" for i in (0, 2, 3, 4, 5, 8, 9, 10)]
    rejected = dataset.info["provenance"]["rejected"]
    assert rejected["count"] == 4
    assert [r["image"] for r in rejected["images"]] == ["im.01.png", "im.06.png", "im.07.png", "im.11.png"]
    assert "not RGB" in rejected["images"][1]["reason"]
    assert "not square" in rejected["images"][3]["reason"]
    assert dataset.verify(images=True) == []


def test_a_shard_of_bad_images_only_is_left_out(source: Path, tmp_path: Path) -> None:
    for i in range(5, 10):
        (source / f"im.{i:02d}.png").unlink()
    dataset = run(source, tmp_path / "out", max_bad=0.5)
    assert sorted(set(dataset.index["shard"])) == ["data/part-000000.tar", "data/part-000002.tar"]
    assert len(dataset) == 7
    assert dataset.verify() == []


def test_a_rerun_only_rewrites_shards_whose_images_changed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latent_medi.shards.importing import images

    first = run(source, tmp_path / "out")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    monkeypatch.setattr(images, "write_shard", lambda *a, **k: pytest.fail("nothing has changed"))
    assert len(run(source, tmp_path / "out")) == len(first)
    monkeypatch.undo()

    monkeypatch.setattr(images, "finish_dataset", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "again")
    monkeypatch.undo()
    written: list[int] = []
    original = images.write_shard
    monkeypatch.setattr(images, "write_shard", lambda o, n, *a, **k: (written.append(n), original(o, n, *a, **k))[1])
    Image.new("RGB", (32, 32)).save(source / "im.06.png")
    run(source, tmp_path / "again", name="out")
    assert written == [1]
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(source / "im.06.png")
    run(source, tmp_path / "out")
    again = {p.name: p.read_bytes() for p in (tmp_path / "again").rglob("*") if p.is_file()}
    assert again["part-000000.tar"] == whole["part-000000.tar"]
    assert again["part-000001.tar"] != whole["part-000001.tar"]


def test_the_same_import_again_never_drops_a_split(source: Path, tmp_path: Path) -> None:
    table = pd.read_csv(source / "table.csv", dtype=str)
    table["part"] = ["train" if int(patient[1:]) % 2 else "test" for patient in table["patient"]]
    table.to_csv(source / "table.csv", index=False)
    dataset = run(source, tmp_path / "out", split_column="part")
    dataset.add_split("mine", dataset.index["split_main"], {"kind": "patients at random"})
    assert run(source, tmp_path / "out", split_column="part").splits == ["main", "mine"]
    assert run(source, tmp_path / "out", split_column="part", codec="webp").splits == ["main", "mine"]
    dataset = run(source, tmp_path / "out", split_column="part")
    dataset.add_split("main", dataset.index["split_main"], {"kind": "patients at random"}, replace=True)
    with pytest.raises(UserError, match=r"a split 'main' \(patients at random\) in place of its own"):
        run(source, tmp_path / "out", split_column="part")
    assert run(source, tmp_path / "out").splits == ["main", "mine"]


def test_processes_do_not_change_the_bytes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "one", name="n")
    run(source, tmp_path / "two", name="n", jobs=2)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / f).rglob("*") if p.is_file()} for f in ("one", "two"))
    assert one == two


def test_tables_that_cannot_be_imported(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'clas'.*'class'"):
        run(source, tmp_path / "out", class_field="clas")
    table = pd.read_csv(source / "table.csv", dtype=str, keep_default_na=False)
    table.assign(patient="").to_csv(source / "table.csv", index=False)
    with pytest.raises(UserError, match="no patient"):
        run(source, tmp_path / "out")
    table.assign(image="im.00.png").to_csv(source / "table.csv", index=False)
    with pytest.raises(UserError, match="both have the key 'im-00'"):
        run(source, tmp_path / "out")
    with pytest.raises(UserError, match="'gif'"):
        run(source, tmp_path / "out", codec="gif")


def test_larger_images_are_tiled(source: Path, tmp_path: Path) -> None:
    original = np.asarray(Image.open(source / "im.03.png"))
    tiled = run(source, tmp_path / "tiles", patch_size=12, mpp=0.5, tile=True)
    mine = tiled.index[tiled.index["key"].str.startswith("im-03/")]
    assert mine["key"].tolist() == ["im-03/0_0", "im-03/12_0", "im-03/0_12", "im-03/12_12"]
    assert set(tiled.index["x"]) == {-1}  # where the image lies in its slide is not known
    table = pd.read_csv(source / "table.csv", dtype=str).assign(x="100", y="200")
    table.to_csv(source / "table.csv", index=False)
    placed = run(source, tmp_path / "placed", patch_size=12, mpp=0.5, tile=True, x_column="x", y_column="y")
    assert placed.index[["x", "y"]].to_numpy()[:4].tolist() == [[100, 200], [112, 200], [100, 212], [112, 212]]
    middle = run(source, tmp_path / "middle", patch_size=12, mpp=0.5, x_column="x", y_column="y")
    assert middle.index[["x", "y"]].to_numpy()[0].tolist() == [110, 210]
    assert np.array_equal(tiled.read([mine.index[3]])[0], original[12:24, 12:24])
    assert len(tiled) == 48
    with pytest.raises(UserError, match="resolution of a patch is not given"):
        run(source, tmp_path / "none", tile=True)


def test_a_folder_is_read_by_a_pattern(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for i in range(6):
        target = folder / "ab"[i % 2] / f"p{i // 2}_{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((source / f"im.{i:02d}.png").read_bytes())
    pattern = r"(?P<class>[^/]+)/(?P<patient>[^_]+)_[0-9]+\.png"
    settings = ImportSettings(
        folder=str(folder), pattern=pattern, out=str(tmp_path / "out"), patch_size=16, source_mpp=0.5
    )
    dataset = import_images(settings)
    assert dataset.index.groupby("class")["patient"].nunique().to_dict() == {"a": 3, "b": 3}
    (folder / "a" / "stray.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"1 of 7 images do not match.*a/stray\.png"):
        import_images(settings)
    for bad, words in (("(?P<class>.*)", "names no patient"), ("(", "no regular expression")):
        with pytest.raises(UserError, match=words):
            import_images(ImportSettings(folder=str(folder), pattern=bad, out=str(tmp_path / "x"), source_mpp=0.5))


def test_a_folder_needs_no_pattern_where_an_image_is_a_patient(source: Path, tmp_path: Path) -> None:
    words = {"table": "", "folder": str(source), "categorical": [], "class_field": ""}
    dataset = run(source, tmp_path / "out", **words, patient_is="image")
    assert dataset.index["patient"].nunique() == len(dataset.index) == 12
    with pytest.raises(UserError, match="names no patient"):
        run(source, tmp_path / "no", **words)


def test_an_image_bomb_is_named_and_not_unpacked(source: Path, tmp_path: Path) -> None:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)  # 10 GB of pixels in a few bytes
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (source / "im.05.png").write_bytes(bomb)
    dataset = run(source, tmp_path / "out", max_bad=0.1)
    (entry,) = dataset.info["provenance"]["rejected"]["images"]
    assert entry["image"] == "im.05.png"
    assert "exceeds limit" in entry["reason"]


def test_images_that_are_all_too_small_are_one_message(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        UserError, match=r"12 of 12 images are smaller than 256 px \(the first is 32 × 32 px\)"
    ) as caught:
        run(source, tmp_path / "out", patch_size=256)
    assert "patch_size=32" in str(caught.value)
    assert caplog.text == ""


def test_some_small_images_are_one_line_with_a_full_list_beside_it(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for i in range(6):  # the first one too: it does not decide what the others have to be
        Image.new("RGB", (12, 12 + i)).save(source / f"im.{i:02d}.png")
    with pytest.raises(
        UserError, match=r"6 of 12 images are bad[\s\S]*6 images, such as im\.00\.png \(12 × 12 px\)"
    ) as caught:
        run(source, tmp_path / "out")
    assert "is smaller than 16 px" in str(caught.value)
    assert "set patch_size" in str(caught.value)
    assert "im.05.png" not in str(caught.value)
    listed = (tmp_path / "out" / ".progress" / "rejected.txt").read_text().splitlines()
    assert listed[0] == "im.00.png: is smaller than 16 px: 12 × 12 px"
    assert len(listed) == 6
    assert caplog.text == ""
    dataset = run(source, tmp_path / "out", max_bad=0.5)
    assert dataset.info["mpp"] == 1.0
    assert len(dataset.info["provenance"]["rejected"]["images"]) == 6
    assert not (tmp_path / "out" / ".progress").exists()
    assert [record.levelname for record in caplog.records if record.levelname != "INFO"] == ["WARNING"]


def test_a_published_split_is_brought_in_as_a_column(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = pd.read_csv(source / "table.csv", dtype=str, keep_default_na=False)
    part = {"p0": "train", "p1": "train", "p2": "", "p3": "test", "p4": "test", "p5": "train"}
    table["fold"] = table["patient"].map(part)
    table.to_csv(source / "table.csv", index=False)
    dataset = run(source, tmp_path / "out", split_column="fold")
    assert dataset.splits == ["main"]
    assert dataset.index["split_main"].tolist() == table["fold"].tolist()
    assert dataset.verify() == []
    for i in (0, 1):  # nothing of p0 is left
        (source / f"im.{i:02d}.png").write_bytes(b"")
    assert run(source, tmp_path / "less", split_column="fold", max_bad=0.2).index["split_main"].tolist()[0] == "train"
    table["fold"] = table["patient"].map(part | {"p5": "test"})
    table.to_csv(source / "table.csv", index=False)
    changed = run(source, tmp_path / "less", split_column="fold", max_bad=0.2)
    assert changed.index["split_main"].tolist()[-1] == "test"
    assert "verbs look for" not in caplog.text
    table.loc[0, "fold"] = "test"
    table.to_csv(source / "table.csv", index=False)
    with pytest.raises(UserError, match="fold: 1 patients are in more than one part: 'p0'"):
        run(source, tmp_path / "torn", split_column="fold")
    table.loc[0, "fold"] = ""
    table.to_csv(source / "table.csv", index=False)
    with pytest.raises(UserError, match="patient 'p0' has images in a part and images in none"):
        run(source, tmp_path / "torn", split_column="fold")
    table.assign(fold=table["patient"]).to_csv(source / "table.csv", index=False)
    run(source, tmp_path / "folds", split_column="fold", max_bad=0.2)
    assert "verbs look for train and test" in caplog.text


def test_what_was_written_and_checked_is_said_in_a_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "im.03.png").write_bytes(b"")
    words = [f"table={source / 'table.csv'}", f"out={tmp_path / 'out'}", "patch_size=16", "source_mpp=0.5"]
    assert main(["shards", "images", *words, "max_bad=0.1"]) == 0
    told = f"11 patches of 6 patients in {tmp_path / 'out'}"
    assert capsys.readouterr().out == f"{told}; 1 image rejected, see its dataset.json\n"
    assert main(["shards", "verify", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"no problem: {told}\n"
