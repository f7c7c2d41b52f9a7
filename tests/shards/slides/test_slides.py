from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from slide_parts import GLASS, tissue, write_slide

from latent_medi.cli import main
from latent_medi.core.errors import Incomplete, UserError
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.importing.resolution import resolution
from latent_medi.shards.settings import ImportSettings, SlideSettings
from latent_medi.shards.slides.cut import cut_slides
from latent_medi.shards.slides.cutter import grid, shuffled
from latent_medi.shards.slides.job import SlideJob, run, run_slide
from latent_medi.shards.slides.slide import PatchError, Slide, SlideError
from latent_medi.shards.slides.tissue import otsu, pen_and_black, tissue_mask, tissue_share


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides with a TCGA name and one without; 0.5 µm per pixel."""
    folder = tmp_path_factory.mktemp("slides")
    uuid = "8923A151-A690-40B7-9E5A-FCBEDFC2394F"
    write_slide(folder / f"TCGA-3L-AA1B-01Z-00-DX1.{uuid}.tif", tissue(1600, 1200, 0))
    write_slide(folder / f"TCGA-3L-AA1B-01Z-00-DX2.{uuid}.tif", tissue(1500, 1100, 1))
    write_slide(folder / "biopsy 7.b.tif", tissue(1300, 1000, 2))
    return folder


def cut(slides: Path, out: Path, **more: object) -> SlideSettings:
    values: dict = {"source": str(slides), "out": str(out), "patch_size": 64, "mpp": 1.0, "max_patches": 12, "jobs": 2}
    return SlideSettings(**values | more)


def test_slides_become_a_dataset_whose_keys_have_no_dot(slides: Path, tmp_path: Path) -> None:
    result = cut_slides(cut(slides, tmp_path / "out"))
    dataset = PatchDataset.open(tmp_path / "out")
    assert result["patches"] == len(dataset) == 36
    assert not dataset.verify(images=True)
    index = dataset.index
    assert set(index["slide"]) == {"TCGA-3L-AA1B-01Z-00-DX1", "TCGA-3L-AA1B-01Z-00-DX2", "biopsy 7-b"}
    assert set(index.loc[index["slide"].str.startswith("TCGA"), "patient"]) == {"TCGA-3L-AA1B"}
    assert not index["key"].str.contains(".", regex=False).any()
    assert set(index["source_mpp"].round(6)) == {0.5}
    # Patches lie where the index says: their colours are those of the level-0 region, averaged.
    row = index.iloc[5]
    with Slide(next(slides.glob(f"{row['slide']}*")) if "TCGA" in row["slide"] else slides / "biopsy 7.b.tif") as slide:
        level0 = np.asarray(slide._region(int(row["x"]), int(row["y"]), 0, (128, 128)))
    assert np.abs(level0.mean((0, 1)) - dataset.read([5])[0].mean((0, 1))).max() < 1.5
    table = pd.read_csv(tmp_path / "out" / "qc" / "slides.csv")
    assert table["kept"].tolist() == [12, 12, 12]
    assert (tmp_path / "out" / "qc" / "biopsy 7-b.png").is_file()


def test_the_same_slides_give_the_same_bytes_and_a_rerun_is_free(slides: Path, tmp_path: Path) -> None:
    for name, jobs in (("a", 1), ("b", 3)):
        cut_slides(cut(slides, tmp_path / name, jobs=jobs, name="same"))
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file() and "qc" not in p.parts
    )
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    before = {f: (tmp_path / "a" / f).stat().st_mtime_ns for f in files}
    cut_slides(cut(slides, tmp_path / "a", name="same"))
    assert before == {f: (tmp_path / "a" / f).stat().st_mtime_ns for f in files}
    # Another seed chooses other patches.
    cut_slides(cut(slides, tmp_path / "c", name="same", seed=1))
    assert (tmp_path / "c" / files[0]).read_bytes() != (tmp_path / "a" / files[0]).read_bytes()


def test_bad_slides_are_named_and_the_rest_is_finished(slides: Path, tmp_path: Path) -> None:
    source = tmp_path / "slides"
    source.mkdir()
    write_slide(source / "good.tif", tissue(1400, 1100))
    write_slide(source / "silent.tif", tissue(1400, 1100), mpp=None)
    write_slide(source / "coarse.tif", tissue(800, 800), mpp=4.0)
    write_slide(source / "glass.tif", np.full((1000, 1000, 3), GLASS, np.uint8))
    (source / "empty.svs").write_bytes(b"")
    (source / "text.svs").write_bytes(b"not a slide at all")
    whole = write_slide(tmp_path / "whole.tif", tissue(1400, 1100)).read_bytes()
    (source / "cut.tif").write_bytes(whole[: len(whole) // 3])
    os.mkfifo(source / "pipe.tif")  # opening it would never return
    (source / "gone.tif").symlink_to(tmp_path / "archive" / "gone.tif")
    write_slide(source / "trailing .tif", tissue(1400, 1100))
    (source / "._good.tif").write_bytes(b"\0\5\x16\7")
    with pytest.raises(Incomplete, match="9 of 10 slides were left out") as caught:
        cut_slides(cut(source, tmp_path / "out"))
    told = caught.value.result["left_out"]
    assert told["pipe.tif"] == "quarantined: a pipe, not a file"
    assert told["gone.tif"].startswith("quarantined: a link to ")
    assert told["trailing .tif"].startswith("quarantined: 'trailing ' cannot be its key")
    assert "skipped: no resolution" in told["silent"]
    assert "skipped: coarser than the patches' 1 µm per pixel: 4 × 4" in told["coarse"]
    assert told["glass"].startswith("empty: no tissue: nothing but glass")
    assert told["empty"] == "quarantined: the file is empty"
    assert "OpenSlide does not know the format" in told["text"]
    assert told["cut"].startswith("quarantined: ")
    assert caught.value.result["reasons"]["quarantined: the file is empty"] == 1
    assert sum(caught.value.result["reasons"].values()) == 9
    table = pd.read_csv(tmp_path / "out" / "qc" / "slides.csv").set_index("slide")
    assert len(table) == 10
    assert f"quarantined: {table.loc['gone.tif', 'reason']}" == told["gone.tif"]
    assert set(PatchDataset.open(tmp_path / "out").index["slide"]) == {"good"}
    assert not list((tmp_path / "out").rglob(".tmp*"))
    # What was missing is given: only that slide is cut, and the others stay as they are.
    for name in ("pipe", "gone", "trailing "):
        (source / f"{name}.tif").unlink()
    for name in ("coarse", "glass", "cut"):
        (source / f"{name}.tif").unlink()
    for name in ("empty", "text"):
        (source / f"{name}.svs").unlink()
    (tmp_path / "mpp.csv").write_text("slide,mpp\nsilent.tif,0.5\n", encoding="utf-8-sig")
    result = cut_slides(cut(source, tmp_path / "out", mpp_table=str(tmp_path / "mpp.csv")))
    assert result["slides"] == {"kept": 2}
    assert set(PatchDataset.open(tmp_path / "out").index["slide"]) == {"good", "silent"}


def test_a_slide_that_may_not_be_read(slides: Path, tmp_path: Path) -> None:
    path = write_slide(tmp_path / "secret.tif", tissue(600, 600))
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # root may read everything: be somebody else for a moment
        os.seteuid(65534)
    try:
        with pytest.raises(SlideError, match="Permission denied"):
            Slide(path)
    finally:
        if root:
            os.seteuid(0)


def test_the_command_exits_with_3_and_writes_what_it_found(slides: Path, tmp_path: Path) -> None:
    source = tmp_path / "slides"
    source.mkdir()
    write_slide(source / "good.tif", tissue(1400, 1100))
    (source / "bad.svs").write_bytes(b"no slide")
    words = ["shards", "slides", f"source={source}", "patch_size=64", "mpp=1.0", "max_patches=4"]
    assert main([*words, f"out={tmp_path / 'out'}", "--json", str(tmp_path / "r.json")]) == 3
    assert json.loads((tmp_path / "r.json").read_text())["slides"] == {"kept": 1, "quarantined": 1}
    assert main([*words, "dry_run=true", "--json", str(tmp_path / "d.json")]) == 3
    told = json.loads((tmp_path / "d.json").read_text())
    assert told["patches"] == 4
    assert told["bytes"] > 0
    (source / "good.tif").unlink()
    assert main([*words, f"out={tmp_path / 'none'}"]) == 2
    assert not (tmp_path / "none" / "dataset.json").exists()


def test_a_table_brings_fields_and_patients(slides: Path, tmp_path: Path) -> None:
    table = tmp_path / "slides.csv"
    names = sorted(p.name for p in slides.iterdir())
    table.write_text("slide,patient,class,site\n" + "".join(f"{n},p{i},c{i % 2},s\n" for i, n in enumerate(names)))
    cut_slides(cut(slides, tmp_path / "out", table=str(table), class_field="class", categorical=["site"]))
    dataset = PatchDataset.open(tmp_path / "out")
    assert dataset.schema.names == ("class", "site")
    assert dataset.index.groupby("patient")["class"].first().to_dict() == {"p0": "c0", "p1": "c1", "p2": "c0"}
    with pytest.raises(UserError, match="closest: 'class'"):
        cut_slides(cut(slides, tmp_path / "x", table=str(table), class_field="clas"))
    (tmp_path / "mpp.csv").write_text('slide,mpp\nother.tif,"0,5"\n')
    with pytest.raises(UserError, match="decimal comma"):
        cut_slides(cut(slides, tmp_path / "x", mpp_table=str(tmp_path / "mpp.csv")))
    (tmp_path / "mpp.csv").write_text("slide,mpp\nother.tif,0.5\n")
    with pytest.raises(UserError, match="names unknown slides"):
        cut_slides(cut(slides, tmp_path / "x", mpp_table=str(tmp_path / "mpp.csv")))


def test_both_axes_have_their_own_resolution(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "wide.tif", tissue(1600, 800), mpp=(0.25, 0.5))
    with Slide(path) as slide:
        assert (slide.mpp.x, slide.mpp.y) == pytest.approx((0.25, 0.5), rel=1e-4)
        patch = slide.patch(600, 300, 64, 1.0)  # 256 × 128 level-0 pixels
        region = slide._region(600, 300, 0, (256, 128)).resize((64, 64), 4)
    assert np.abs(np.asarray(region, float) - patch).mean() < 3


def test_transparent_tiles_show_the_slides_background_not_black(slides: Path) -> None:
    with Slide(slides / "biopsy 7.b.tif") as slide:
        outside = slide._region(5000, 5000, 0, (16, 16))
        assert set(np.asarray(outside).reshape(-1)) == {255}
        slide.background = (10, 200, 30)
        assert np.asarray(slide._region(5000, 5000, 0, (4, 4))).reshape(-1, 3).tolist() == [[10, 200, 30]] * 16


def test_a_failed_read_is_tried_once_more_on_a_new_handle_and_then_dropped(slides: Path, tmp_path: Path) -> None:
    import openslide

    path = next(slides.glob("*DX1*"))

    class Failing:
        """OpenSlide errors latch: once one occurred, the handle is of no use."""

        def __init__(self, handle: object, times: list[int]) -> None:
            self.handle, self.times = handle, times

        def __getattr__(self, name: str) -> object:
            return getattr(self.handle, name)

        def read_region(self, *arguments: object) -> object:
            if self.times[0] > 0:
                self.times[0] -= 1
                raise openslide.OpenSlideError("Restart marker missing")
            return self.handle.read_region(*arguments)  # type: ignore[attr-defined]

    with Slide(path) as slide:
        good = slide.patch(600, 500, 64, 1.0)
        times = [1]
        opened = slide._open
        slide._open = lambda: Failing(opened(), times)  # type: ignore[method-assign]
        slide._handle = slide._open()
        np.testing.assert_array_equal(slide.patch(600, 500, 64, 1.0), good)
        times[0] = 2
        with pytest.raises(PatchError, match="Restart marker"):
            slide.patch(600, 500, 64, 1.0)
        np.testing.assert_array_equal(slide.patch(600, 500, 64, 1.0), good)  # the slide goes on


def test_unreadable_patches_are_dropped_and_too_many_quarantine(
    slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = next(slides.glob("*DX1*"))
    real = Slide.patch
    bad: list[int] = []

    def sometimes(self: Slide, x: int, y: int, *rest: object) -> np.ndarray:
        if (x // 128 + y // 128) % 10 == 0:
            bad.append(x)
            raise PatchError("tile is damaged")
        return real(self, x, y, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Slide, "patch", sometimes)
    job = SlideJob(
        str(path), "k", "p", SlideSettings(patch_size=64, mpp=1.0, max_unreadable=0.5), folder=str(tmp_path / "out")
    )
    row = run(job)
    assert row["rejected_unreadable"] == len(bad) > 0
    assert row["kept"] == row["candidates"] - len(bad) - row["rejected_white"]
    # A share of what was read, not of what could have been: a few patches out of a damaged slide are no sample of it.
    row = run(
        SlideJob(
            str(path),
            "k",
            "p",
            SlideSettings(patch_size=64, mpp=1.0, max_unreadable=0.02, max_patches=30),
            folder=str(tmp_path / "few"),
        )
    )
    assert row["status"] == "quarantined"
    row = run(
        SlideJob(
            str(path),
            "k",
            "p",
            SlideSettings(patch_size=64, mpp=1.0, max_unreadable=0.0),
            folder=str(tmp_path / "other"),
        )
    )
    assert row["status"] == "quarantined"
    assert "tile is damaged" in row["reason"]
    assert not list((tmp_path / "other").rglob("*.tar"))


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, (0.25, 0.26, "openslide.mpp")),
        ({"aperio.MPP": "0.499"}, (0.499, 0.499, "aperio.MPP")),
        ({"aperio.MPP": "0,499"}, (0.499, 0.499, "aperio.MPP")),
        (
            {"tiff.XResolution": "40000", "tiff.YResolution": "20000", "tiff.ResolutionUnit": "centimeter"},
            (0.25, 0.5, "tiff.XResolution"),
        ),
        ({"tiff.XResolution": "50800", "tiff.ResolutionUnit": "inch"}, (0.5, 0.5, "tiff.XResolution")),
        ({"philips.DICOM_PIXEL_SPACING": '"0.000227" "0.000250"'}, (0.25, 0.227, "philips.DICOM_PIXEL_SPACING")),
        # Placeholders and bare magnifications are no resolution.
        ({"tiff.XResolution": "72", "tiff.ResolutionUnit": "inch"}, None),
        ({"openslide.objective-power": "40"}, None),
        ({"openslide.mpp-x": "0", "openslide.mpp-y": "0"}, None),
        ({}, None),
    ],
)
def test_the_chain_of_resolutions(properties: dict[str, str], expected: tuple[float, float, str] | None) -> None:
    found = resolution(properties)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.x, found.y) == pytest.approx(expected[:2], rel=1e-6)
        assert found.source == expected[2]


def test_levels_by_their_fractional_downsample(slides: Path) -> None:
    with Slide(next(slides.glob("*DX1*"))) as slide:
        slide.downsamples = (1.0, 3.9999, 16.0)
        assert [slide.level_for(d) for d in (0.98, 1.0, 3.8, 3.95, 4.0, 15.0, 15.9, 40.0)] == [0, 0, 0, 1, 1, 1, 2, 2]


@settings(max_examples=100, deadline=None)
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), extent=st.floats(10, 700), overlap=st.floats(0, 0.9))
def test_the_grid_stays_inside_and_leaves_no_room_for_another(
    width: int, height: int, extent: float, overlap: float
) -> None:
    corners = grid((width, height), (extent, extent), overlap)
    if min(width, height) < extent:
        assert len(corners) == 0
        return
    assert (corners >= 0).all()
    assert (corners + extent <= np.array([width, height]) + 1e-3).all()
    step = extent * (1 - overlap)
    assert corners[:, 0].max() + step + extent > width - 1.001
    assert len(np.unique(corners, axis=0)) == len(corners) or step < 1


def test_the_choice_depends_on_seed_and_slide_only() -> None:
    assert (shuffled(50, 0, "a") == shuffled(50, 0, "a")).all()
    assert (shuffled(50, 0, "a") != shuffled(50, 1, "a")).any()
    assert (shuffled(50, 0, "a") != shuffled(50, 0, "b")).any()


def test_tissue_is_found_and_pen_is_not() -> None:
    image = tissue(400, 300)
    truth = np.abs(image.astype(int) - np.array(GLASS)).max(-1) > 30
    found = tissue_mask(image, 8.0)
    assert (found & truth).sum() / (found | truth).sum() > 0.95
    painted = image.copy()
    painted[:60, :60] = (20, 120, 60)
    painted[:60, 340:] = (40, 90, 220)
    painted[240:, :60] = (15, 15, 18)
    assert pen_and_black(painted)[:60, :60].all()
    again = tissue_mask(painted, 8.0)
    assert not again[:60, :60].any()
    assert not again[:60, 340:].any()
    assert not again[240:, :60].any()
    assert (again & truth).sum() / (again | truth).sum() > 0.9


def test_pale_tissue_on_a_mostly_empty_slide_and_tissue_from_edge_to_edge() -> None:
    image = np.full((500, 900, 3), GLASS, np.uint8)
    draw = np.random.default_rng(0)
    image = np.clip(image + draw.normal(0, 1.5, image.shape), 0, 255).astype(np.uint8)
    image[100:180, 100:180] = (170, 60, 140)
    image[180:260, 100:180] = (228, 196, 216)  # pale, next to the dark
    found = tissue_mask(image, 8.0)
    assert found[105:255, 105:175].mean() > 0.95
    assert found.sum() < 1.3 * 160 * 80
    full = np.clip(np.array([205, 130, 175]) + draw.normal(0, 12, (200, 200, 3)), 0, 255).astype(np.uint8)
    assert tissue_mask(full, 8.0).mean() > 0.95
    assert not tissue_mask(np.full((200, 200, 3), 244, np.uint8), 8.0).any()


def test_otsu_and_shares_by_hand() -> None:
    assert 20 < otsu(np.array([10] * 50 + [20] * 50 + [200] * 30 + [210] * 30)) < 200
    mask = np.zeros((10, 10), bool)
    mask[:5] = True
    boxes = np.array([[0, 0, 10, 10], [0, 0, 5, 5], [0, 5, 5, 10], [2, 4, 4, 6]], float)
    assert tissue_share(mask, boxes).tolist() == [0.5, 1.0, 0.0, 0.5]


def test_real_slides(shared: Path, tmp_path: Path) -> None:
    source = shared / "data" / "slides"
    if not source.is_dir():
        pytest.skip(f"{source} is absent")
    with pytest.raises(Incomplete) as caught:
        cut_slides(cut(source, tmp_path / "out", patch_size=128, mpp=0.5, max_patches=20))
    told = caught.value.result["left_out"]
    assert "no resolution" in told["TCGA-CR-7395-01A-01-TS1"]
    assert "not a slide" in told["broken"]
    (tmp_path / "mpp.csv").write_text("slide,mpp\ntcga-cr-7395-01a-01-ts1.svs,0.5\n")
    with pytest.raises(Incomplete, match=r"1 of 3 slides were left out:\n.*broken.svs"):
        cut_slides(
            cut(source, tmp_path / "out", patch_size=128, mpp=0.5, max_patches=20, mpp_table=str(tmp_path / "mpp.csv"))
        )
    index = PatchDataset.open(tmp_path / "out").index
    assert index.groupby("slide").size().to_dict() == {"TCGA-CR-7395-01A-01-TS1": 20, "cmu-1-small-region": 20}


@pytest.mark.slow
def test_killed_at_random_moments_and_rerun_gives_the_unbroken_bytes(slides: Path, tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "latent_medi.cli",
        "shards",
        "slides",
        f"source={slides}",
        "patch_size=64",
        "mpp=0.5",
        "name=same",
        "jobs=2",
    ]
    start = time.monotonic()
    subprocess.run([*words, f"out={tmp_path / 'whole'}"], check=True)
    takes = time.monotonic() - start
    draw = np.random.default_rng(0)
    for _ in range(20):
        process = subprocess.Popen([*words, f"out={tmp_path / 'killed'}"], start_new_session=True)
        time.sleep(float(draw.uniform(0.2, takes)))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*words, f"out={tmp_path / 'killed'}"], check=True)
    found = [
        {p.relative_to(tmp_path / name).as_posix(): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("whole", "killed")
    ]
    tables = [pd.read_csv(tmp_path / name / "qc" / "slides.csv", dtype=str) for name in ("whole", "killed")]
    assert all(table.pop("seconds").notna().all() for table in tables)  # the only thing that differs between two runs
    assert tables[0].equals(tables[1])
    assert all(files.pop("qc/slides.csv") for files in found)
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_dask_cluster_that_loses_a_worker(slides: Path, tmp_path: Path) -> None:
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster:
        pids = [worker.pid for worker in cluster.workers.values()]
        threading.Timer(1.5, lambda: os.kill(pids[0], signal.SIGKILL)).start()
        result = cut_slides(cut(slides, tmp_path / "dask", dask=cluster.scheduler_address, name="same"))
    cut_slides(cut(slides, tmp_path / "here", name="same"))
    assert result["slides"] == {"kept": 3}
    assert (tmp_path / "dask" / "dataset.json").read_bytes() == (tmp_path / "here" / "dataset.json").read_bytes()


@pytest.mark.slow
def test_images_on_a_dask_cluster_that_loses_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dask.distributed import LocalCluster

    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(60):
        Image.fromarray(tissue(700, 700, number)).save(folder / f"p{number // 4}_{number}.png")
    monkeypatch.chdir(tmp_path)  # workers elsewhere have another working folder
    common = {"folder": "images", "pattern": r"(?P<patient>p[0-9]+)_[0-9]+\.png", "class_field": "", "name": "same"}
    common |= {"patch_size": 64, "source_mpp": 0.5, "mpp": 1.0, "tile": True, "patches_per_shard": 3}
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", local_directory=tmp_path / "dask"
    ) as cluster:
        pids = [worker.pid for worker in cluster.workers.values()]
        threading.Timer(0.5, lambda: os.kill(pids[0], signal.SIGKILL)).start()
        import_images(ImportSettings(out="far", dask=cluster.scheduler_address, **common))
        assert pids != [worker.pid for worker in cluster.workers.values()]
    import_images(ImportSettings(out="here", **common))
    for name in ("dataset.json", "index.parquet"):
        assert Path("far", name).read_bytes() == Path("here", name).read_bytes()


def test_no_scheduler_there(slides: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No Dask scheduler answers at nowhere"):
        cut_slides(cut(slides, tmp_path / "out", dask="nowhere"))


def test_rounded_resolutions_and_levels_give_patches_of_the_size_asked_for(tmp_path: Path) -> None:
    # TIFF stores resolutions as 32-bit floats, and levels of odd slides are rounded up.
    for mpp in (0.2525, 0.2201, 0.23, 0.4545, 0.4604):
        path = write_slide(tmp_path / f"r{mpp}.tif", tissue(700, 700), mpp=mpp, levels=1)
        with Slide(path) as slide:
            assert slide.patch(100, 100, 256, mpp).shape == (256, 256, 3)
    with Slide(path) as slide:
        slide.downsamples = (1.99999,)
        assert slide.patch(0, 0, 128, 2 * mpp).shape == (128, 128, 3)


def test_a_table_without_a_patient_is_refused_not_filled_in(slides: Path, tmp_path: Path) -> None:
    names = sorted(p.name for p in slides.iterdir())
    (tmp_path / "t.csv").write_text(
        "slide,patient\n" + "".join(f"{n},{'p' if i else ''}\n" for i, n in enumerate(names))
    )
    with pytest.raises(UserError, match="has no patient"):
        cut_slides(cut(slides, tmp_path / "out", table=str(tmp_path / "t.csv")))


def test_a_rerun_keeps_splits_and_shards_whatever_was_added_or_moved_away(tmp_path: Path) -> None:
    source = tmp_path / "slides"
    source.mkdir()
    for i, name in enumerate(("m", "n")):
        write_slide(source / f"{name}.tif", tissue(1300, 1000, i))
    (source / "z.svs").write_bytes(b"no slide")
    options = {"patch_size": 64, "max_patches": 5, "name": "same"}
    with pytest.raises(Incomplete):
        cut_slides(cut(source, tmp_path / "out", **options))
    dataset = PatchDataset.open(tmp_path / "out")
    dataset.add_split("main", ["train" if s == "m" else "test" for s in dataset.index["slide"]], {"kind": "by hand"})
    tar = (tmp_path / "out" / "data" / "part-000001.tar").stat()
    write_slide(source / "a.tif", tissue(1300, 1000, 7))  # sorts first: every number shifts
    with pytest.raises(Incomplete):
        cut_slides(cut(source, tmp_path / "out", **options))
    dataset = PatchDataset.open(tmp_path / "out")
    assert dataset.verify(images=True) == []
    assert dataset.info["splits"]["main"]["recipe"] == {"kind": "by hand"}
    assert dataset.index.groupby("slide")["split_main"].first().to_dict() == {"a": "", "m": "train", "n": "test"}
    moved = (tmp_path / "out" / "data" / "part-000002.tar").stat()
    assert (tar.st_ino, tar.st_mtime_ns) == (moved.st_ino, moved.st_mtime_ns)
    # A slide that is out of reach for a moment is no reason to throw away what was cut from it.
    table = tmp_path / "t.csv"
    table.write_text("slide,patient\na.tif,a\nm.tif,m\nn.tif,n\n")
    cut_slides(cut(source, tmp_path / "table", table=str(table), **options))
    (source / "m.tif").rename(tmp_path / "archived.tif")
    write_slide(source / "b.tif", tissue(1300, 1000, 8))
    table.write_text("slide,patient\na.tif,a\nm.tif,m\nn.tif,n\nb.tif,b\n")
    assert cut_slides(cut(source, tmp_path / "table", table=str(table), **options))["slides"] == {"kept": 4}


ENDLESS = ("patch_size=2", "mpp=0.5", "max_white=1")


def endless_slide(path: Path) -> Path:
    """A slide that takes many minutes with the settings :data:`ENDLESS`: four million patches."""
    return write_slide(path, np.full((4000, 4000, 3), (214, 138, 180), np.uint8), levels=1)


def test_a_slide_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    path = endless_slide(tmp_path / "forever.tif")
    job = SlideJob(
        str(path),
        "forever",
        "p",
        SlideSettings(patch_size=2, mpp=0.5, max_white=1.0, timeout=1.5),
        folder=str(tmp_path / "out"),
    )
    row = run_slide(job)  # it may well not have begun
    assert (row["status"], row["reason"]) == ("quarantined", "killed after 1.5 s")
    assert not list((tmp_path / "out").rglob("*.tar"))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_command(tmp_path: Path, how: signal.Signals) -> None:
    import psutil

    source = tmp_path / "slides"
    source.mkdir()
    for i in range(2):
        endless_slide(source / f"forever{i}.tif")
    words = [sys.executable, "-m", "latent_medi.cli", "shards", "slides", f"source={source}", f"out={tmp_path / 'out'}"]
    command = psutil.Popen([*words, *ENDLESS, "jobs=2"], stderr=subprocess.DEVNULL)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while len(children) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        children = [
            c for c in command.children(recursive=True) if "latent_medi.shards.slides.job" in " ".join(c.cmdline())
        ]
    command.send_signal(how)  # whether or not they have asked to go with their parent yet
    command.wait(60)
    gone, alive = psutil.wait_procs(children, timeout=60)
    assert len(gone) == 2
    assert not alive


def test_patches_smaller_than_a_pixel_of_the_contact_sheet(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "wide.tif", tissue(9000, 400), mpp=0.5, levels=1)
    job = SlideJob(
        str(path),
        "k",
        "p",
        SlideSettings(patch_size=4, mpp=0.5, max_patches=3),
        folder=str(tmp_path / "out"),
        sheet=str(tmp_path / "s.png"),
    )
    row = run(job)
    assert (row["status"], row["reason"]) == ("kept", "")
    assert (tmp_path / "s.png").is_file()


def test_a_slide_that_cannot_be_opened_again_for_a_moment(slides: Path) -> None:
    with Slide(next(slides.glob("*DX1*"))) as slide:
        good = slide.patch(600, 500, 64, 1.0)
        opened, slide._open = slide._open, lambda: (_ for _ in ()).throw(SlideError("stale file handle"))  # type: ignore[method-assign]
        slide.close()
        with pytest.raises(PatchError, match="stale file handle"):
            slide.patch(600, 500, 64, 1.0)
        slide._open = opened  # type: ignore[method-assign]
        np.testing.assert_array_equal(slide.patch(600, 500, 64, 1.0), good)
