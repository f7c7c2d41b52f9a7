"""Lanczos resizing, by cykooz.resizer where it is installed, else by Pillow, which takes four times as long."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from latent_medi.shards.format.software import FAST_RESIZER as FAST

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels, fractions allowed."""


def lanczos(image: Image.Image, edge: int, box: Box) -> np.ndarray:
    """A part of a picture as a square, antialiased.

    Both libraries compute the same filter across and then down, each rounded to 8 bits. With weights of another
    precision, values differ by 1 of 255 in fewer than 1 of 200 places, by 2 in 1 of 100,000.

    Args:
        image: RGB.
        edge: Edge of the square in pixels.
        box: What to take of the picture.

    Returns:
        uint8 [edge, edge, 3].
    """
    if FAST:
        return _fast(np.asarray(image), edge, box)
    return np.asarray(image.resize((edge, edge), Image.Resampling.LANCZOS, box=box))


def _fast(pixels: np.ndarray, edge: int, box: Box) -> np.ndarray:
    import cykooz_resizer as fast

    left, top, right, bottom = box
    height, width, _ = pixels.shape
    rgb, resizer = fast.PixelType.U8x3, fast.Resizer()

    def resize(source: Any, size: tuple[int, int], part: Box) -> Any:
        crop = fast.CropBox(part[0], part[1], part[2] - part[0], part[3] - part[1])
        method = fast.ResizeAlg.convolution(fast.FilterType.lanczos3)
        target = fast.ImageData(*size, rgb)
        resizer.resize(source, target, fast.ResizeOptions(resize_alg=method, crop_box=crop, use_alpha=False))
        return target

    # Across first, as Pillow does it: by itself the library goes down first, and rounds elsewhere.
    whole = fast.ImageData(width, height, rgb, pixels.tobytes())
    across = resize(whole, (edge, height), (left, 0.0, right, float(height)))
    square = resize(across, (edge, edge), (0.0, top, float(edge), bottom))
    return np.frombuffer(square.get_buffer(), np.uint8).reshape(edge, edge, 3)
