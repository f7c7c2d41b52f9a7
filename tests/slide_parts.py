"""Pyramidal TIFFs that OpenSlide opens, painted with tissue-like blobs on glass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from scipy import ndimage

GLASS, PINK, VIOLET = (243, 241, 244), (214, 138, 180), (110, 70, 150)


def tissue(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A pink ellipse with violet spots on glass, uint8 [height, width, 3]."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = ((x / width - 0.5) / 0.35) ** 2 + ((y / height - 0.5) / 0.3) ** 2 < 1
    spots = ndimage.gaussian_filter(draw.random((height, width)), 3)
    image = np.empty((height, width, 3))
    image[:] = GLASS
    image[inside] = PINK
    image[inside & (spots > np.quantile(spots, 0.85))] = VIOLET
    return np.clip(image + draw.normal(0, 2, image.shape), 0, 255).astype(np.uint8)


def write_slide(path: Path, image: np.ndarray, mpp: float | tuple[float, float] | None = 0.5, levels: int = 3) -> Path:
    """A tiled pyramidal TIFF, each level half the one before; resolution in its tags unless ``mpp`` is ``None``."""
    across, down = mpp if isinstance(mpp, tuple) else (mpp, mpp)
    with tifffile.TiffWriter(path) as file:
        for level in range(levels):
            size = (image.shape[1] >> level, image.shape[0] >> level)
            pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX)) if level else image
            options: dict = {}
            if across is not None and down is not None:
                scale = 2**level
                options = {"resolution": (1e4 / across / scale, 1e4 / down / scale), "resolutionunit": "CENTIMETER"}
            file.write(
                pixels, tile=(256, 256), photometric="rgb", compression="zlib", subfiletype=1 if level else 0,
                metadata=None, **options,
            )  # fmt: skip
    return path
