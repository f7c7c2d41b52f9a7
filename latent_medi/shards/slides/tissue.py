"""A mask of the tissue on a thumbnail, without a network.

Pen and black are excluded; Otsu's threshold on colour saturation finds the tissue (Otsu, IEEE Trans. SMC 9, 1979). A
second pass repeats it around the tissue of the first, where glass and tissue are balanced: it keeps pale tissue on a
mostly empty slide.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from scipy import ndimage

THUMBNAIL_MPP = 8.0
"""µm per pixel of the thumbnail from which masks are made."""
_SMALLEST_UM2 = 20_000.0  # smaller specks are dust
_LARGEST_HOLE_UM2 = 20_000.0  # smaller holes are lumina
_AROUND_UM = 400.0  # extent of the second pass around the first one's tissue
_LOG_SCALE = 255 / np.log(256)
_LEAST_SATURATION = 8.0  # of 255 between glass and tissue; below it the slide is taken for empty


def otsu(values: np.ndarray) -> float:
    """The threshold on [0, 255] that separates two groups with the least variance within.

    Args:
        values: Any number of values in [0, 255].
    """
    counts = np.bincount(np.clip(values, 0, 255).astype(np.int64).reshape(-1), minlength=256).astype(np.float64)
    below = np.cumsum(counts)
    moment = np.cumsum(counts * np.arange(256))
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    between = np.nan_to_num(between)
    # Between two separate groups every threshold is as good: take the middle one.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float(best.mean())


def hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hue in degrees [0, 360), saturation and value on [0, 255], each float32 [h, w].

    Args:
        image: uint8 [h, w, 3].
    """
    hue, saturation, value = np.moveaxis(np.asarray(Image.fromarray(image).convert("HSV"), np.float32), -1, 0)
    return hue * (360 / 256), saturation, value


def pen_and_black(image: np.ndarray) -> np.ndarray:
    """Marker ink (green, blue, red, black), scanner borders and opaque folds; bool [h, w].

    Haematoxylin and eosin have hues from violet-blue to pink (235° to 350°); inks have others, or are far more
    saturated.

    Args:
        image: uint8 [h, w, 3].
    """
    hue, saturation, value = hsv(image)
    green = (hue > 65) & (hue < 190) & (saturation > 50)
    blue = (hue >= 190) & (hue < 232) & (saturation > 90)
    red = ((hue < 15) | (hue > 350)) & (saturation > 150)
    black = (value < 60) | ((value < 110) & (saturation < 40))
    return green | blue | red | black


def tissue_mask(image: np.ndarray, mpp: float = THUMBNAIL_MPP) -> np.ndarray:
    """The mask of tissue, bool [h, w].

    Args:
        image: Thumbnail, uint8 [h, w, 3].
        mpp: Its µm per pixel.
    """
    bad = ndimage.binary_dilation(pen_and_black(image), iterations=1)
    _, saturation, _ = hsv(image)
    saturation = ndimage.median_filter(saturation, 3)
    usable = ~bad
    if not usable.any():
        return np.zeros(image.shape[:2], bool)
    first = usable & (saturation > _threshold(saturation[usable]))
    if not first.any():
        return first
    around = ndimage.binary_dilation(_without_small(first, mpp), iterations=max(1, round(_AROUND_UM / mpp))) & usable
    if not around.any():
        return around
    second = around & (saturation > min(_threshold(saturation[around]), _threshold(saturation[usable])))
    second = ndimage.binary_closing(np.pad(second, 2), iterations=2)[2:-2, 2:-2] & usable
    holes = ~_without_small(second, mpp)
    return ~_without_small(holes, mpp, _LARGEST_HOLE_UM2) & usable


def why_no_tissue(image: np.ndarray, mpp: float = THUMBNAIL_MPP) -> str:
    """The likely reason why no tissue was found on a thumbnail, in words.

    Args:
        image: Thumbnail, uint8 [h, w, 3].
        mpp: Its µm per pixel.
    """
    _, saturation, value = hsv(image)
    least = _SMALLEST_UM2 / mpp**2  # pixels
    if (near_black := float((value < 60).mean())) > 0.5:
        return f"dark: {near_black:.0%} of it is near-black (fluorescence, or inverted?)"
    stained = (value >= 60) & (value < 200)
    if stained.sum() >= least and np.median(saturation[stained]) < _LEAST_SATURATION:
        return "grey: tissue is found by its colour (min_tissue=0 takes all)"
    if (covered := pen_and_black(image)).sum() >= least:
        return f"no tissue: {covered.mean():.0%} of it is taken for marker ink or black, the rest for glass"
    if value.size < 2 * least:
        size = " × ".join(f"{pixels * mpp / 1000:.1g}" for pixels in (image.shape[1], image.shape[0]))
        return f"too small to find tissue on: the whole slide is about {size} mm, if its resolution is right"
    return "no tissue: nothing but glass, or too pale to tell from it"


def _threshold(saturation: np.ndarray) -> float:
    """Otsu's threshold on a logarithmic scale, or one above everything if there are no two groups.

    On that scale glass and pale tissue differ as much as pale and dark tissue.
    """
    level = float(np.expm1(otsu(np.log1p(saturation) * _LOG_SCALE) / _LOG_SCALE))
    low, high = saturation[saturation <= level], saturation[saturation > level]
    if not len(low):  # no glass at all
        return -1.0 if np.median(saturation) > 2 * _LEAST_SATURATION else 256.0
    if not len(high) or np.median(high) - np.median(low) < _LEAST_SATURATION:
        return -1.0 if np.median(saturation) > 4 * _LEAST_SATURATION else 256.0
    if np.median(low) > 4 * _LEAST_SATURATION:  # both groups are stained: tissue from edge to edge
        return -1.0
    return level


def _without_small(mask: np.ndarray, mpp: float, least: float = _SMALLEST_UM2) -> np.ndarray:
    """The connected regions of at least ``least`` µm²."""
    labels, count = ndimage.label(mask)
    keep = np.bincount(labels.reshape(-1), minlength=count + 1) * mpp**2 >= least
    keep[0] = False
    return keep[labels]


def tissue_share(mask: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Share of tissue in each box, 0 to 1.

    Args:
        mask: bool [h, w].
        boxes: float [n, 4]: left, top, right, bottom in pixels of the mask, each at least partly inside.
    """
    height, width = mask.shape
    total = np.zeros((height + 1, width + 1), np.int64)
    total[1:, 1:] = mask.astype(np.int64).cumsum(0).cumsum(1)
    left, top = (np.clip(np.floor(boxes[:, i]).astype(int), 0, limit - 1) for i, limit in ((0, width), (1, height)))
    right = np.clip(np.ceil(boxes[:, 2]).astype(int), left + 1, width)
    bottom = np.clip(np.ceil(boxes[:, 3]).astype(int), top + 1, height)
    inside = total[bottom, right] - total[top, right] - total[bottom, left] + total[top, left]
    return inside / ((right - left) * (bottom - top))
