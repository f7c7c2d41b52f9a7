"""The same job done by another program, run by that program's Python; :mod:`patching` starts it.

    python patching_peer.py (tiatoolbox | histolab) SLIDE PATCH MPP SLIDE_MPP FEW MANY

Tissue by the peer's own Otsu mask, patches at the resolution asked for, PNG files by the peer's own writer. Prints the
rate of the patches beyond the first few, as JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


def tiatoolbox(slide: str, patch: int, mpp: float, slide_mpp: float, folder: Path) -> Iterator[None]:
    """One patch written per step."""
    from tiatoolbox.tools.patchextraction import get_patch_extractor
    from tiatoolbox.utils.misc import imwrite
    from tiatoolbox.wsicore.wsireader import OpenSlideWSIReader

    reader = OpenSlideWSIReader(slide, mpp=(slide_mpp, slide_mpp))
    patches = get_patch_extractor(
        "slidingwindow",
        input_img=reader,
        input_mask="otsu",
        patch_size=(patch, patch),
        resolution=mpp,
        units="mpp",
        min_mask_ratio=0.0,
        within_bound=True,
    )
    for number, image in enumerate(patches):
        imwrite(folder / f"{number}.png", image)
        yield


def histolab(slide: str, patch: int, mpp: float, slide_mpp: float, folder: Path) -> Iterator[None]:
    """One patch written per step."""
    from histolab.masks import TissueMask
    from histolab.slide import Slide
    from histolab.tiler import GridTiler

    handle = Slide(slide, processed_path=str(folder), use_largeimage=True)
    tiler = GridTiler(tile_size=(patch, patch), mpp=mpp, tissue_percent=0.0)
    tiler.tile_size = tiler._tile_size(handle)
    # What GridTiler.extract does, so that it can be stopped.
    for number, (tile, _) in enumerate(tiler._tiles_generator(handle, TissueMask())):
        tile.save(folder / f"{number}.png")
        yield


def seconds(name: str, slide: str, patch: int, mpp: float, slide_mpp: float, count: int) -> float:
    """For so many patches."""
    peer = {"tiatoolbox": tiatoolbox, "histolab": histolab}[name]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = sum(1 for _ in itertools.islice(peer(slide, patch, mpp, slide_mpp, Path(folder)), count))
        if done != count:
            raise SystemExit(f"{name} gave {done} patches, not {count}")
        return time.perf_counter() - start


if __name__ == "__main__":
    program, path, edge, resolution, of_slide, few, many = sys.argv[1:]
    # The first time pays for imports.
    _, first, second = (
        seconds(program, path, int(edge), float(resolution), float(of_slide), int(count)) for count in (few, few, many)
    )
    print(json.dumps({"rate": (int(many) - int(few)) / (second - first)}))
