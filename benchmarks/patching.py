"""Patches per second and core from a whole slide, in steady state.

    python benchmarks/patching.py [--region SLIDE] [--peer NAME=PYTHON ...] [--quick] [--json FILE]

Two pyramidal TIFFs, of 20,480 × 20,480 px and of a quarter of its edge, are built from a region of a real slide
(``--region``; without it, of a generated texture), and all patches with tissue are cut from each. Each figure comes
from a process pinned to one core and one thread. Start-up and finding the tissue are taken out: the rate is that of the
large slide's patches beyond the small one's, in processor seconds, so that other work on the machine changes it little.
The ceiling is a bare loop over the same positions: OpenSlide's ``read_region``, RGB, Lanczos, Pillow's PNG, and nothing
else. A peer is ``tiatoolbox`` or ``histolab``, with the Python of an environment that has it, doing the same job its
own way (:mod:`patching_peer`); TIAToolbox is given our mask. Ours and TIAToolbox take three turns each; the medians
count.
"""

from __future__ import annotations

import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import tifffile
import tifffile._imagecodecs
from output import options, report
from PIL import Image
from scipy import ndimage

from latent_medi.shards.settings import SlideSettings
from latent_medi.shards.slides.cutter import Cutter
from latent_medi.shards.slides.job import SlideJob, run
from latent_medi.shards.slides.slide import Slide
from latent_medi.shards.slides.tissue import THUMBNAIL_MPP, tissue_mask
from latent_medi.shards.writing.records import finished_shards

EDGE, TILE, MPP, PATCH, LEAST_TISSUE = 20_480, 256, 0.75, 256, 0.5
BASE = 2048  # edge of the region that the slide repeats, mirrored


def region(path: Path | None) -> np.ndarray:
    """uint8 [BASE, BASE, 3] of a slide's densest part, or generated."""
    if path is None:
        draw = np.random.default_rng(0)
        noise = ndimage.gaussian_filter(draw.normal(0, 1, (BASE, BASE, 3)), (2, 2, 0))
        return np.clip(np.array([205, 120, 170]) + 45 * noise / noise.std(), 0, 255).astype(np.uint8)
    with openslide.OpenSlide(str(path)) as slide:
        picture = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    spots = [
        (y, x) for y in range(0, picture.shape[0] - BASE + 1, 128) for x in range(0, picture.shape[1] - BASE + 1, 128)
    ]
    y, x = min(spots, key=lambda p: float(picture[p[0] : p[0] + BASE : 16, p[1] : p[1] + BASE : 16].mean()))
    return picture[y : y + BASE, x : x + BASE]


def build(path: Path, base: np.ndarray, edge: int) -> None:
    """A tiled JPEG pyramid of four levels, as scanners write them."""
    # tifffile writes tiles that are encoded already as they are, but asks for its codecs first.
    codecs: Any = tifffile._imagecodecs
    codecs.jpeg_encode = codecs.jpeg_decode = lambda *_, **__: None
    wide = np.concatenate([base, base[:, ::-1]], 1)
    mosaic = Image.fromarray(np.concatenate([wide, wide[::-1]], 0))

    def tiles(level: int) -> Iterator[bytes]:
        image = np.asarray(mosaic.resize((mosaic.width >> level, mosaic.height >> level), Image.Resampling.BOX))
        period, encoded = image.shape[0] // TILE, {}
        along = -(-(edge >> level) // TILE)  # the last one is cut off where the level ends within it
        for row in range(along):
            for column in range(along):
                at = (row % period, column % period)
                if at not in encoded:
                    y, x = at[0] * TILE, at[1] * TILE
                    buffer = io.BytesIO()
                    Image.fromarray(image[y : y + TILE, x : x + TILE]).save(buffer, "JPEG", quality=85, subsampling=2)
                    encoded[at] = buffer.getvalue()
                yield encoded[at]

    with tifffile.TiffWriter(path) as file:
        for level in range(4):
            file.write(
                tiles(level),
                shape=(edge >> level, edge >> level, 3),
                dtype="uint8",
                tile=(TILE, TILE),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                subfiletype=1 if level else 0,
                metadata=None,
                resolution=(20_000 / 2**level,) * 2,
                resolutionunit="CENTIMETER",
            )


def settings() -> SlideSettings:
    """All patches with tissue, and no other reason to leave one out."""
    return SlideSettings(patch_size=PATCH, mpp=MPP, min_tissue=LEAST_TISSUE, max_white=1.0, max_black=1.0)


def cut(slide: Path, folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Processor and wall seconds to cut a slide, the patches' positions [n, 2], and the bytes of their files.

    Opening the slide and finding its tissue is timed by itself, and taken out.
    """
    job = SlideJob(str(slide), "s", "p", settings(), folder=str(folder))

    def now() -> np.ndarray:
        return np.array([time.process_time(), time.perf_counter()])

    start = now()
    with Slide(slide) as opened:
        Cutter(opened, job)
    before = now()
    row = run(job)
    seconds = (now() - before) - (before - start)
    assert row["status"] == "kept", row
    rows = finished_shards(folder)[0].rows
    return seconds, rows[["x", "y"]].to_numpy(), int(rows["size"].sum())


def bare(slide: Path, positions: np.ndarray) -> float:
    """Processor seconds for the same reads, resize and codec."""
    with openslide.OpenSlide(str(slide)) as handle:
        side = round(PATCH * MPP / 0.5)
        start = time.process_time()
        for x, y in positions.tolist():
            image = handle.read_region((x, y), 0, (side, side)).convert("RGB")
            image = image.resize((PATCH, PATCH), Image.Resampling.LANCZOS)
            image.save(io.BytesIO(), "PNG", compress_level=1, compress_type=3)
        return time.process_time() - start


def worker(small: Path, large: Path, what: str) -> dict[str, float]:
    """One pinned process: rate of the large slide's patches beyond the small one's."""
    with tempfile.TemporaryDirectory() as name:
        first, few, _ = cut(small, Path(name) / "few")
        second, many, size = cut(large, Path(name) / "many")
    more = len(many) - len(few)
    processor, wall = (second - first).tolist()
    result = {
        "rate": more / processor,
        "wall_rate": more / wall,
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "patches": len(many),
        "kib": size / len(many) / 1024,
    }
    if what == "bare":
        result["bare"] = more / (bare(large, many) - bare(small, few))
    return result


def pinned(core: int, small: Path, large: Path, what: str = "ours") -> subprocess.Popen[str]:
    """Start a worker on one core."""
    words = [sys.executable, __file__, "--worker", str(small), str(large), what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(["taskset", "-c", str(core), *words], stdout=subprocess.PIPE, text=True, env=environment)


def peer(name: str, python: str, small: Path, large: Path) -> dict[str, float]:
    """A peer's rate, pinned like a worker."""
    script = Path(__file__).with_name("patching_peer.py")
    words = [python, "-W", "ignore", str(script), name, str(small), str(large), str(PATCH), str(MPP), "0.5"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    output = subprocess.run(
        ["taskset", "-c", "0", *words, str(LEAST_TISSUE)], stdout=subprocess.PIPE, text=True, env=environment
    )
    if output.returncode:
        raise SystemExit(f"{name} ended with exit code {output.returncode}")
    return json.loads(output.stdout.splitlines()[-1])


def finished(process: subprocess.Popen[str]) -> dict[str, float]:
    """What a worker found."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a worker ended with exit code {process.returncode}")
    return json.loads(output)


def median(runs: list[dict[str, float]], key: str) -> float:
    """Of a figure over repeated runs."""
    return float(np.median([one[key] for one in runs]))


def slides(folder: Path, base: np.ndarray, edge: int) -> tuple[Path, Path]:
    """A small and a large slide, each with its mask of tissue next to it (``.png``)."""
    small, large = folder / "small.tif", folder / "large.tif"
    for path, length in ((small, edge // 4), (large, edge)):
        build(path, base, length)
        with Slide(path) as slide:
            mask = tissue_mask(slide.thumbnail(THUMBNAIL_MPP))
        Image.fromarray(mask.astype(np.uint8)).save(path.with_suffix(".png"))
    return small, large


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        small, large, what = sys.argv[2:5]
        print(json.dumps(worker(Path(small), Path(large), what)))
        return
    parser = options(__doc__, "smaller slides")
    parser.add_argument("--region", type=Path, help="slide whose densest region is repeated")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="tiatoolbox or histolab")
    arguments = parser.parse_args()
    peers = [(name, python) for name, _, python in (given.partition("=") for given in arguments.peer)]
    with tempfile.TemporaryDirectory() as folder:
        small_slide, large_slide = slides(Path(folder), region(arguments.region), 8192 if arguments.quick else EDGE)
        ours: list[dict[str, float]] = []
        theirs: dict[str, list[dict[str, float]]] = {name: [] for name, _ in peers}
        for turn in range(1 if arguments.quick else 3):
            ours.append(finished(pinned(0, small_slide, large_slide, "bare")))
            for name, python in peers:
                if not turn or name != "histolab":  # slow
                    theirs[name].append(peer(name, python, small_slide, large_slide))
        together = [finished(process) for process in [pinned(core, small_slide, large_slide) for core in (0, 1)]]
    rate = median(ours, "rate")
    result: dict[str, Any] = {
        "slide_edge_px": 8192 if arguments.quick else EDGE,
        "patches": int(ours[0]["patches"]),
        "patches_per_s_per_core": rate,
        "bare_loop_patches_per_s": median(ours, "bare"),
        "over_bare_loop": rate / median(ours, "bare"),
        "two_processes_over_one": sum(one["wall_rate"] for one in together) / median(ours, "wall_rate"),
        "peak_gib_per_worker": max(one["gib"] for one in together),
        "kib_per_patch": ours[0]["kib"],
    }
    for name, runs in theirs.items():
        result |= {f"{name}_patches": int(runs[0]["patches"]), f"{name}_kib_per_patch": runs[0]["kib"]}
        result |= {f"{name}_patches_per_s": median(runs, "rate"), f"over_{name}": rate / median(runs, "rate")}
    report(result, arguments.json)


if __name__ == "__main__":
    main()
