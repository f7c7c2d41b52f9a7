"""Patches per second and core from a whole slide, in steady state.

    python benchmarks/patching.py [--region SLIDE] [--peer NAME=PYTHON ...] [--quick] [--json FILE]

A pyramidal TIFF of 20,480 × 20,480 px is built from a region of a real slide (``--region``; without it, of a generated
texture). Each figure comes from a process pinned to one core and one thread. Start-up, thumbnail and mask are taken
out: the rate is that of the later patches. The ceiling is a bare loop over the same positions: OpenSlide's
``read_region``, RGB, Lanczos, PNG, and nothing else. A peer is ``tiatoolbox`` or ``histolab``, with the Python of an
environment that has it, doing the same job its own way (:mod:`patching_peer`).
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
from latent_medi.shards.slides.job import SlideJob, run
from latent_medi.shards.writing.records import finished_shards

EDGE, TILE, MPP, PATCH = 20_480, 256, 0.75, 256
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
    tifffile._imagecodecs.jpeg_encode = tifffile._imagecodecs.jpeg_decode = lambda *_, **__: None
    wide = np.concatenate([base, base[:, ::-1]], 1)
    mosaic = Image.fromarray(np.concatenate([wide, wide[::-1]], 0))

    def tiles(level: int) -> Iterator[bytes]:
        image = np.asarray(mosaic.resize((mosaic.width >> level, mosaic.height >> level), Image.Resampling.BOX))
        period, encoded = image.shape[0] // TILE, {}
        for row in range((edge >> level) // TILE):
            for column in range((edge >> level) // TILE):
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


def cut(slide: Path, folder: Path, patches: int) -> tuple[float, np.ndarray]:
    """Seconds for a job of so many patches, and their positions."""
    job = SlideJob(
        str(slide),
        "s",
        "p",
        SlideSettings(patch_size=PATCH, mpp=MPP, min_tissue=0.0, max_patches=patches, max_white=1.0),
        folder=str(folder),
    )
    start = time.perf_counter()
    row = run(job)
    seconds = time.perf_counter() - start
    assert row["kept"] == patches, row
    return seconds, finished_shards(folder)[0].rows[["x", "y"]].to_numpy()


def bare(slide: Path, positions: np.ndarray) -> float:
    """Seconds for the same reads, resize and codec."""
    with openslide.OpenSlide(str(slide)) as handle:
        side = round(PATCH * MPP / 0.5)
        start = time.perf_counter()
        for x, y in positions.tolist():
            image = handle.read_region((x, y), 0, (side, side)).convert("RGB")
            image = image.resize((PATCH, PATCH), Image.Resampling.LANCZOS)
            image.save(io.BytesIO(), "PNG", compress_level=1, compress_type=3)
        return time.perf_counter() - start


def worker(slide: Path, few: int, many: int, what: str) -> dict[str, float]:
    """One pinned process: rate of the patches beyond the first few."""
    with tempfile.TemporaryDirectory() as name:
        first, positions = cut(slide, Path(name) / "few", few)
        second, more = cut(slide, Path(name) / "many", many)
    result = {
        "rate": (many - few) / (second - first),
        "gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    if what == "both":
        ratios = []
        for _ in range(3):
            result["bare"] = (many - few) / (bare(slide, more) - bare(slide, positions))
            ratios.append(result["bare"])
        result["bare"] = float(np.median(ratios))
    return result


def pinned(core: int, slide: Path, few: int, many: int, what: str) -> subprocess.Popen[str]:
    """Start a worker on one core."""
    words = [sys.executable, __file__, "--worker", str(slide), str(few), str(many), what]
    environment = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.Popen(["taskset", "-c", str(core), *words], stdout=subprocess.PIPE, text=True, env=environment)


def peer(name: str, python: str, slide: Path, few: int, many: int) -> float:
    """A peer's rate, pinned like a worker."""
    script = Path(__file__).with_name("patching_peer.py")
    words = [python, "-W", "ignore", str(script), name, str(slide), str(PATCH), str(MPP), "0.5", str(few), str(many)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    output = subprocess.run(["taskset", "-c", "0", *words], stdout=subprocess.PIPE, text=True, env=environment)
    if output.returncode:
        raise SystemExit(f"{name} ended with exit code {output.returncode}")
    return json.loads(output.stdout.splitlines()[-1])["rate"]


def finished(process: subprocess.Popen[str]) -> dict[str, float]:
    """What a worker found."""
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"a worker ended with exit code {process.returncode}")
    return json.loads(output)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        slide, few, many, what = sys.argv[2:6]
        print(json.dumps(worker(Path(slide), int(few), int(many), what)))
        return
    parser = options(__doc__, "a smaller slide and fewer patches")
    parser.add_argument("--region", type=Path, help="slide whose densest region is repeated")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help="tiatoolbox or histolab")
    arguments = parser.parse_args()
    edge, few, many = (8192, 50, 250) if arguments.quick else (EDGE, 300, 1500)
    with tempfile.TemporaryDirectory() as name:
        slide = Path(name) / "slide.tif"
        build(slide, region(arguments.region), edge)
        alone = finished(pinned(0, slide, few, many, "both"))
        pair = [pinned(core, slide, few, many, "ours") for core in (0, 1)]
        together = [finished(process) for process in pair]
        peers = {
            name: peer(name, python, slide, few, many)
            for name, _, python in (given.partition("=") for given in arguments.peer)
        }
    result: dict[str, Any] = {
        "slide_edge_px": edge,
        "patches_per_s_per_core": alone["rate"],
        "bare_loop_patches_per_s": alone["bare"],
        "over_bare_loop": alone["rate"] / alone["bare"],
        "two_processes_over_one": sum(one["rate"] for one in together) / alone["rate"],
        "peak_gib_per_worker": max(one["gib"] for one in together),
    }
    for name, rate in peers.items():
        result |= {f"{name}_patches_per_s": rate, f"over_{name}": alone["rate"] / rate}
    report(result, arguments.json)


if __name__ == "__main__":
    main()
