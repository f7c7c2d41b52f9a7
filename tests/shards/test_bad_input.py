"""Input as it comes: each fault gets one clear error, and nothing that was finished is lost."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from slide_parts import tissue, write_slide

from latent_medi.cli import main
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.metadata.schema import Schema
from latent_medi.recipes.registry import load_recipe
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import ImportSettings
from latent_medi.shards.writing.writer import Patch, write_dataset

Make = Callable[..., list[Patch]]


def images(folder: Path, count: int = 40) -> Path:
    folder.mkdir()
    draw = np.random.default_rng(0)
    rows = []
    for i in range(count):
        Image.fromarray(draw.integers(0, 256, (128, 128, 3), dtype=np.uint8)).save(folder / f"i{i:02d}.png")
        rows.append({"image": f"i{i:02d}.png", "patient": f"p{i // 4}", "class": "ab"[i % 2], "mpp": "0.5"})
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    return folder


def test_a_full_disk_stops_and_a_rerun_with_room_goes_on(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = images(tmp_path / "source")
    words = ["shards", "images", f"table={source / 'table.csv'}", "source_mpp=0.5", "patch_size=128", "name=n"]
    words.append("patches_per_shard=6")
    assert main([*words, f"out={small_disk / 'out'}"]) == 2
    assert "The disk is full" in capsys.readouterr().err
    assert not (small_disk / "out" / "dataset.json").exists()
    kept = len(list((small_disk / "out" / "data").glob("part-*.tar")))
    assert kept > 0
    assert not list((small_disk / "out").rglob(".tmp-*"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert main([*words, f"out={small_disk / 'out'}"]) == 0
    assert main([*words, f"out={tmp_path / 'whole'}"]) == 0
    for file in (p for p in (tmp_path / "whole").rglob("*") if p.is_file()):
        assert file.read_bytes() == (small_disk / "out" / file.relative_to(tmp_path / "whole")).read_bytes()


def test_a_full_disk_is_no_fault_of_the_slide(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slides").mkdir()
    for i in range(2):
        write_slide(tmp_path / "slides" / f"s{i}.tif", tissue(1600, 1200, i))
    words = ["shards", "slides", f"source={tmp_path / 'slides'}", f"out={small_disk / 'out'}", "patch_size=128"]
    assert main([*words, "mpp=0.5"]) == 2
    error = capsys.readouterr().err
    assert "the disk is full" in error
    assert "quarantined" not in error


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("zero", "Not a readable image"),
        ("grey16", "not RGB"),
        ("cmyk", "not RGB"),
        ("palette", "not RGB"),
        ("alpha", "not RGB"),
        ("half", "Not a readable image"),
        ("bomb", "Not a readable image: Image size .* exceeds limit"),
    ],
)
def test_images_that_are_not_8_bit_rgb_are_named(tmp_path: Path, kind: str, reason: str) -> None:
    source = images(tmp_path / "source", 8)
    path = source / "i03.png"
    picture = Image.open(path).convert("RGB")
    if kind == "zero":
        path.write_bytes(b"")
    elif kind == "grey16":
        Image.fromarray(np.full((128, 128), 40_000, np.uint16)).save(path)
    elif kind == "cmyk":
        buffer = io.BytesIO()
        picture.convert("CMYK").save(buffer, "JPEG")
        path.write_bytes(buffer.getvalue())
    elif kind == "palette":
        picture.quantize(16).save(path)
    elif kind == "alpha":
        picture.convert("RGBA").save(path)
    elif kind == "bomb":  # a header that promises 40,000 × 40,000 pixels
        data = bytearray(path.read_bytes())
        data[16:24] = struct.pack(">II", 40_000, 40_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        path.write_bytes(data)
    else:
        path.write_bytes(path.read_bytes()[:5000])
    settings = ImportSettings(
        table=str(source / "table.csv"), out=str(tmp_path / "out"), source_mpp=0.5, patch_size=64, max_bad=0.2
    )
    dataset = import_images(settings)
    (entry,) = dataset.info["provenance"]["rejected"]["images"]
    assert entry["image"] == "i03.png"
    assert re.search(reason, entry["reason"])
    assert len(dataset) == 7


def test_tables_as_spreadsheets_leave_them(tmp_path: Path) -> None:
    source = images(tmp_path / "source", 8)
    settings = ImportSettings(
        table=str(source / "table.csv"), out=str(tmp_path / "out"), source_mpp_column="mpp", patch_size=64
    )
    text = (source / "table.csv").read_text()
    (source / "table.csv").write_text(text, encoding="utf-8-sig")  # a byte-order mark before the first column's name
    assert len(import_images(settings)) == 8
    (source / "table.csv").write_text(text.replace("0.5\n", '"0,5"\n', 1))
    with pytest.raises(UserError, match=r"'i00.png' has the resolution '0,5'"):
        import_images(settings)
    (source / "table.csv").write_text(text.replace(",p0,", ",unknown,", 1))
    with pytest.raises(UserError, match=r"'i00.png' has no patient"):
        import_images(settings)
    (source / "table.csv").write_text(text.replace("patient", "patinet"))
    with pytest.raises(
        UserError, match=r"lacks column 'patient' \(closest: 'patinet'[\s\S]*image, .* patient_column=…"
    ):
        import_images(settings)
    (source / "table.csv").write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(UserError, match=r"Rows 1 and 9 .* would both have the key 'i00'[\s\S]*key_column=…"):
        import_images(settings)


@pytest.fixture
def dataset(tmp_path: Path, make_patches: Make, schema: Schema) -> PatchDataset:
    return write_dataset(tmp_path / "set", make_patches(), "d", schema, 16, 0.5, patches_per_shard=7)


def test_a_tar_cut_in_the_middle_is_found(dataset: PatchDataset, capsys: pytest.CaptureFixture[str]) -> None:
    path = dataset.folder / "data" / "part-000001.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert main(["shards", "verify", str(dataset.folder)]) == 2
    assert "data/part-000001.tar is damaged" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"patch 'p./0..' in .*part-000001\.tar"):
        dataset.read(np.arange(len(dataset)))
    assert len(dataset.read([0, 1, 2])) == 3  # the other shards still give their patches


def test_no_path_leads_out_of_the_folder(dataset: PatchDataset, tmp_path: Path) -> None:
    info, _ = read_sealed(dataset.folder / "dataset.json", "")
    info["shards"][0]["file"] = "data/../../../etc/passwd.tar"
    write_sealed(dataset.folder / "dataset.json", info)
    with pytest.raises(UserError, match="every shard is in data/"):
        PatchDataset.open(dataset.folder)


def test_a_foreign_tars_member_with_dots_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    with tarfile.open(tmp_path / "hub" / "dataset_internal_train_part000.tar", "w") as tar:
        for name, data in (("../../evil/0_8_521.jpg", b"x"), ("../../evil/0_8_521.json", b'{"label": "Lung"}')):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match="'evil' is no TCGA barcode"):
        load_recipe("tcga-ut").build(tmp_path / "hub", tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_a_split_that_would_share_a_patient_changes_nothing(dataset: PatchDataset) -> None:
    before = (dataset.folder / "dataset.json").read_bytes()
    index = dataset.index
    torn = ["train" if i % 2 else "test" for i in range(len(index))]
    with pytest.raises(UserError, match="in more than one part"):
        dataset.add_split("torn", torn, {})
    assert (dataset.folder / "dataset.json").read_bytes() == before
    assert PatchDataset.open(dataset.folder).splits == []


def test_a_defect_of_ours_keeps_its_traceback_and_fails(tmp_path: Path) -> None:
    code = "import latent_medi.cli as c; c.VERBS['audit'] = (lambda w: 1 / 0, ''); raise SystemExit(c.main(['audit']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
