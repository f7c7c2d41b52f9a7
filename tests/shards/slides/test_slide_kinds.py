"""Slides that OpenSlide would read in another way than was meant, or in which no tissue is found: each in its words."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from slide_parts import GLASS, PINK, tissue, write_slide

from latent_medi.shards.settings import SlideSettings
from latent_medi.shards.slides.job import SlideJob, run
from latent_medi.shards.slides.tiff_tags import tiff_tags

IMAGE = tissue(900, 700)
GREY = IMAGE.mean(2).astype(np.uint8)
INK = np.full((700, 900, 3), GLASS, np.uint8)
INK[100:500, 100:500] = (40, 90, 220)
DOTTED = np.full((1400, 1600, 3), GLASS, np.uint8)
DOTTED[300:620, 300:620] = PINK  # whole to the thumbnail, a small part of a patch


def tiff(path: Path, image: np.ndarray, **more: Any) -> Path:
    options: dict = {"tile": (128, 128), "photometric": "rgb", "resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, image, **(options | more))
    return path


KINDS: dict[str, tuple[np.ndarray, dict, str]] = {
    "strips": (IMAGE, {"tile": None}, "skipped: a TIFF in strips, not in tiles: convert it, vips tiffsave"),
    "rgb16": (IMAGE.astype(np.uint16) * 257, {}, "skipped: 16 bits per sample: convert to 8 bits"),
    "rgb12in16": (IMAGE.astype(np.uint16) * 16, {"bigtiff": True}, "skipped: 16 bits per sample: convert to 8 bits"),
    "bigendian16": (IMAGE.astype(np.uint16), {"byteorder": ">"}, "skipped: 16 bits per sample: convert to 8 bits"),
    "bigendian": (IMAGE, {"byteorder": ">"}, "quarantined: a TIFF that OpenSlide does not read: cut off"),
    "grey16": (GREY.astype(np.uint16) * 257, {"photometric": "minisblack"}, "skipped: 16 bits per sample"),
    "float": (IMAGE.astype(np.float32) / 255, {}, "skipped: floating-point samples: convert to 8 bits"),
    "grey": (GREY, {"photometric": "minisblack"}, "empty: grey: tissue is found by its colour"),
    "greyrgb": (np.dstack([GREY] * 3), {}, "empty: grey: tissue is found by its colour"),
    "minwhite": (255 - GREY, {"photometric": "miniswhite"}, "empty: grey, stored inverted (MINISWHITE): "),
    "inverted": (255 - IMAGE, {}, "empty: dark: "),
    "dark": (IMAGE // 16, {}, "empty: dark: 100% of it is near-black"),
    "glass": (np.full((700, 900, 3), GLASS, np.uint8), {}, "empty: no tissue: nothing but glass"),
    "ink": (INK, {}, "empty: no tissue: 2"),
    "tiny": (IMAGE[:40, :40], {}, "skipped: smaller than a patch: 40 × 40 pixels of 0.5 µm, a patch takes 64 × 64"),
    "speck": (
        IMAGE[250:400, 300:450],
        {},
        "empty: too small to find tissue on: the whole slide is about 0.07",
    ),
    "coarse": (IMAGE, {"resolution": (2500, 2500)}, "skipped: coarser than the patches' 0.5 µm per pixel: 4 × 4"),
    "silent": (IMAGE, {"resolution": (72, 72), "resolutionunit": "INCH"}, "skipped: no resolution in µm per pixel: "),
    "good": (IMAGE, {}, "kept: "),
    "planar": (np.moveaxis(IMAGE, 2, 0), {"planarconfig": "separate"}, "kept: "),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_words(tmp_path: Path, kind: str) -> None:
    image, options, expected = KINDS[kind]
    path = tiff(tmp_path / f"{kind}.tif", image, **options)
    row = run(
        SlideJob(
            str(path), kind, "p", SlideSettings(patch_size=64, mpp=0.5, max_patches=4), folder=str(tmp_path / "out")
        )
    )
    assert f"{row['status']}: {row['reason']}".startswith(expected)
    if row["status"] != "kept":
        assert not list((tmp_path / "out").rglob("*.tar"))
    # A dry run tells the same.
    dry = run(
        SlideJob(
            str(path),
            kind,
            "p",
            SlideSettings(patch_size=64, mpp=0.5, max_patches=4, dry_run=True),
            folder=str(tmp_path / "out"),
        )
    )
    assert (dry["reason"], dry["status"]) == (row["reason"], row["status"].replace("kept", "estimated"))


def test_tissue_that_is_not_enough_and_patches_that_do_not_pass(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "dotted.tif", DOTTED)
    row = run(
        SlideJob(
            str(path), "k", "p", SlideSettings(patch_size=256, mpp=1.0, min_tissue=0.9), folder=str(tmp_path / "out")
        )
    )
    assert row["status"] == "empty"
    assert row["reason"].startswith("no patch with enough tissue: at most ")
    assert row["reason"].endswith("% of one is tissue, min_tissue asks for 90 %")
    row = run(
        SlideJob(
            str(path), "k", "p", SlideSettings(patch_size=64, mpp=0.5, min_sharpness=1e6), folder=str(tmp_path / "out")
        )
    )
    assert row["reason"] == f"no patch passed: of {row['candidates']} with tissue, " + (
        f"{row['rejected_blur']} blurred (min_sharpness)"
    )
    # All may be asked for, where tissue cannot be told.
    grey = tiff(tmp_path / "grey.tif", GREY, photometric="minisblack")
    row = run(
        SlideJob(
            str(grey),
            "g",
            "p",
            SlideSettings(patch_size=64, mpp=0.5, min_tissue=0.0, max_white=1.0),
            folder=str(tmp_path / "all"),
        )
    )
    assert (row["status"], row["kept"]) == ("kept", 14 * 10)


@settings(max_examples=200, deadline=None)
@given(head=st.sampled_from([b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0"]), rest=st.binary(max_size=300))
def test_any_bytes_behind_a_tiffs_head_give_tags_or_none(
    tmp_path_factory: pytest.TempPathFactory, head: bytes, rest: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.tif"
    path.write_bytes(head + rest)
    tags = tiff_tags(path)
    assert tags is None or tags.bits >= 0


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tags_of_either_byte_order_and_size(tmp_path: Path, big: bool, order: str) -> None:
    path = tiff(tmp_path / "a.tif", IMAGE.astype(np.uint16), bigtiff=big, byteorder=order)
    tags = tiff_tags(path)
    assert tags is not None
    assert (tags.bits, tags.tiled, tags.floating, tags.white_is_zero) == (16, True, False, False)
    whole = path.read_bytes()
    entry = struct.unpack(order + ("Q" if big else "I"), whole[8:16] if big else whole[4:8])[0]
    path.write_bytes(whole[: entry + 3])
    assert tiff_tags(path) is None
