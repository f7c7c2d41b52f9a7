"""What a second run of the same command finds: killed processes, lost sheets, splits, another dataset."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from slide_parts import tissue, write_slide

from latent_medi.core.errors import Incomplete, UserError
from latent_medi.shards.dataset import INDEX_FILE, INFO_FILE, PatchDataset
from latent_medi.shards.settings import SlideSettings
from latent_medi.shards.slides.cut import cut_slides
from latent_medi.shards.writing.patch import Patch
from latent_medi.shards.writing.writer import write_dataset

KILLER = """
import glob, os, signal, sys, threading, time

def watch():
    while not glob.glob(os.environ["WATCHED"]):
        time.sleep(0.0005)
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

if "slides.job" in " ".join(sys.orig_argv):
    threading.Thread(target=watch, daemon=True).start()
"""


def cut(source: Path, out: Path, **more: object) -> dict:
    values: dict = {"source": str(source), "out": str(out), "patch_size": 64, "mpp": 1.0, "max_patches": 5}
    return cut_slides(SlideSettings(**{**values, "name": "same", **more}))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    for seed, name in enumerate(("a", "=b")):  # a spreadsheet would run the second
        write_slide(folder / f"{name}.tif", tissue(1300, 1000, seed))
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing broke off; copy it to change it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    cut(source, out)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes; of the quality table all but the seconds, which differ between any two runs."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    table = pd.read_csv(folder / "qc" / "slides.csv", dtype=str)
    assert table["seconds"].astype(float).notna().all()
    found["qc/slides.csv"] = table.drop(columns="seconds").to_csv().encode()
    return found


@pytest.mark.parametrize("watched", [".progress/part-000000.parquet", "data/part-000000.tar", "qc/a.png"])
def test_killed_around_a_shard_and_its_sheet_the_rerun_gives_the_unbroken_folder(
    source: Path, whole: Path, tmp_path: Path, watched: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    out = tmp_path / "out"
    words = ["shards", "slides", f"source={source}", f"out={out}", "name=same", "patch_size=64", "mpp=1.0"]
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    killed = subprocess.run(
        [sys.executable, "-m", "latent_medi.cli", *words, "max_patches=5"],
        env={**os.environ, "PYTHONPATH": path, "WATCHED": str(out / watched)},
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (out / INFO_FILE).exists()
    cut(source, out)
    assert contents(out) == contents(whole)


def copied(whole: Path, out: Path) -> Path:
    subprocess.run(["cp", "-a", whole, out], check=True)
    return out


def test_a_lost_sheet_is_drawn_again_and_nothing_is_cut(source: Path, whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path / "out")
    (out / "qc" / "a.png").unlink()
    (out / "qc" / ".tmp-77-=b.png").write_bytes(b"half")
    table = pd.read_csv(out / "qc" / "slides.csv", dtype=str)
    table.loc[table["slide"] == "a", ["bytes", "seconds"]] = (
        ""  # as a run left it that was killed between shard and sheet
    )
    table.to_csv(out / "qc" / "slides.csv", index=False)
    before = {p: p.stat().st_mtime_ns for p in (out / "data").iterdir()}
    assert cut(source, out)["slides"] == {"kept": 2}
    assert contents(out) == contents(whole)
    assert {p: p.stat().st_mtime_ns for p in (out / "data").iterdir()} == before
    # What is whole is left alone.
    times = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    cut(source, out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()} == times


def test_what_was_left_out_is_told_again_until_it_is_mended(source: Path, whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path / "out")
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("a", "=b"):
        (slides / f"{name}.tif").symlink_to(source / f"{name}.tif")
    (slides / "gone.tif").symlink_to(tmp_path / "gone.tif")
    for _ in range(2):
        with pytest.raises(Incomplete, match="1 of 3 slides were left out"):
            cut(slides, out)
        assert list(PatchDataset.open(out).info["provenance"]["left_out"]) == ["gone.tif"]
    (slides / "gone.tif").unlink()
    cut(slides, out)
    assert contents(out) == contents(whole)


def test_a_split_is_never_dropped(source: Path, whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path / "out")
    dataset = PatchDataset.open(out)
    dataset.add_split("main", ["train" if s == "a" else "test" for s in dataset.index["slide"]], {"kind": "by hand"})
    # Other patches of the same patients are in the same parts.
    cut(source, out, seed=1)
    index = PatchDataset.open(out).index
    assert index.groupby("slide")["split_main"].unique().map(list).to_dict() == {"a": ["train"], "=b": ["test"]}
    # Other patients would leave nothing of it.
    table = tmp_path / "t.csv"
    table.write_text("slide,patient\na,p1\n=b,p2\n")
    kept = contents(out)
    with pytest.raises(UserError, match="has the split 'main', and no patient of it is among the slides"):
        cut(source, out, table=str(table))
    table.write_text("slide,patient,class\na,a,x\n=b,=b,y\n")
    cut(source, tmp_path / "classes", table=str(table), class_field="class")
    PatchDataset.open(tmp_path / "classes").add_split("held", ["train"] * 5 + ["test"] * 5, {"kind": "by class"})
    table.write_text("slide,patient,class\na,a,x\n=b,=b,x\n")
    with pytest.raises(UserError, match=r"splits held, which may depend on fields that have changed since.*such as =b"):
        cut(source, tmp_path / "classes", table=str(table), class_field="class")
    (out / INDEX_FILE).write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"would drop its splits \(main\)"):
        cut(source, out, seed=2)
    (out / INDEX_FILE).write_bytes(kept[INDEX_FILE])
    assert contents(out) == kept


def test_another_dataset_is_not_replaced(source: Path, tmp_path: Path) -> None:
    from latent_medi.metadata.schema import Schema

    patches = [Patch(f"p{i}", np.full((16, 16, 3), i, np.uint8), f"p{i}", f"p{i}", -1, -1, 0.5, {}) for i in range(3)]
    write_dataset(tmp_path / "out", patches, "mine", Schema(), 16, 0.5)
    with pytest.raises(UserError, match="holds another dataset, 'mine', which was not cut from slides"):
        cut(source, tmp_path / "out")
    assert len(PatchDataset.open(tmp_path / "out")) == 3


@pytest.mark.parametrize(("mpp", "told"), [(0.00025, "Is it in mm?"), (250.0, "Is it in nm?"), (float("nan"), "0.05")])
def test_patches_have_a_resolution_that_scanners_have(source: Path, tmp_path: Path, mpp: float, told: str) -> None:
    with pytest.raises(UserError) as caught:
        cut(source, tmp_path / "out", mpp=mpp)
    assert told in str(caught.value)
    assert not (tmp_path / "out").exists()
