"""The same job done by another program, run by that program's Python; :mod:`patching` starts it.

    python patching_peer.py (tiatoolbox | histolab) SMALL LARGE PATCH MPP SLIDE_MPP LEAST_TISSUE

All patches with tissue at the resolution asked for, PNG files by the peer's own writer. TIAToolbox takes the mask
next to the slide (``.png``), histolab makes its own. Prints the rate per processor second of the large slide's patches
beyond the small one's, their number and their mean size in KiB, as JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


def tiatoolbox(slide: str, patch: int, mpp: float, slide_mpp: float, least: float, folder: Path) -> Iterator[None]:
    """One patch written per step."""
    import numpy as np
    from PIL import Image
    from tiatoolbox.tools.patchextraction import get_patch_extractor
    from tiatoolbox.utils.misc import imwrite
    from tiatoolbox.wsicore.wsireader import OpenSlideWSIReader

    reader = OpenSlideWSIReader(slide, mpp=(slide_mpp, slide_mpp))
    patches = get_patch_extractor(
        "slidingwindow",
        input_img=reader,
        input_mask=np.asarray(Image.open(Path(slide).with_suffix(".png"))),
        patch_size=(patch, patch),
        resolution=mpp,
        units="mpp",
        min_mask_ratio=least,
        within_bound=True,
    )
    for number, image in enumerate(patches):
        imwrite(folder / f"{number}.png", image)
        yield


def histolab(slide: str, patch: int, mpp: float, slide_mpp: float, least: float, folder: Path) -> Iterator[None]:
    """One patch written per step."""
    from histolab.masks import TissueMask
    from histolab.slide import Slide
    from histolab.tiler import GridTiler

    handle = Slide(slide, processed_path=str(folder), use_largeimage=True)
    tiler = GridTiler(tile_size=(patch, patch), mpp=mpp, tissue_percent=100 * least)
    tiler.tile_size = tiler._tile_size(handle)
    # What GridTiler.extract does, so that it can be stopped.
    for number, (tile, _) in enumerate(tiler._tiles_generator(handle, TissueMask())):
        tile.save(folder / f"{number}.png")
        yield


def seconds(
    name: str, slide: str, patch: float, mpp: float, slide_mpp: float, least: float
) -> tuple[float, int, float]:
    """Processor seconds for a slide; also the number of patches, and their mean size in KiB."""
    peer = {"tiatoolbox": tiatoolbox, "histolab": histolab}[name]
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        start = time.process_time()
        done = sum(1 for _ in peer(slide, int(patch), mpp, slide_mpp, least, folder))
        took = time.process_time() - start
        return took, done, sum(file.stat().st_size for file in folder.glob("*.png")) / done / 1024


if __name__ == "__main__":
    program, small, large, *numbers = sys.argv[1:]
    # The first time pays for imports.
    runs = [seconds(program, slide, *map(float, numbers)) for slide in (small, small, large)]
    (first, few, _), (second, many, size) = runs[1:]
    print(json.dumps({"rate": (many - few) / (second - first), "patches": many, "kib": size}))
