"""Resolutions in µm per pixel: read from a slide's properties or given by hand, checked, never guessed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from latent_medi.core.errors import UserError

MPP_RANGE = (0.05, 20.0)
"""µm per pixel beyond which a value is taken for a placeholder, such as the 72 dpi that image programs write, or for
another unit.
"""


@dataclass(frozen=True)
class Resolution:
    """µm per pixel at level 0 along both axes, and the property that it was read from."""

    x: float
    y: float
    source: str


def check_mpp(value: float, what: str) -> None:
    """Refuse a resolution that no scanner has, such as 0.00025 (in mm) or 250 (in nm).

    Args:
        value: In µm per pixel.
        what: What has it, as a sentence begins.

    Raises:
        UserError: It is beyond :data:`MPP_RANGE`, or no number.
    """
    low, high = MPP_RANGE
    if low <= value <= high:
        return
    units = {"mm": value * 1000, "nm": value / 1000, "cm": value * 10_000}
    fits = next((unit for unit, meant in units.items() if low <= meant <= high), "")
    hint = f"Is it in {fits}? That would be {units[fits]:g} µm per pixel." if fits else "Check the value and its unit."
    raise UserError(f"{what} is {value:g}; it is in µm per pixel, from {low:g} to {high:g}.", hint)


def _number(properties: Mapping[str, str], name: str) -> float:
    try:
        return float(str(properties.get(name, "")).strip().strip('"').replace(",", "."))
    except ValueError:
        return math.nan


def _pair(properties: Mapping[str, str], x: str, y: str, factor: float = 1.0) -> tuple[float, float]:
    across, down = _number(properties, x), _number(properties, y)
    return across * factor, (across if math.isnan(down) else down) * factor


def _tiff(properties: Mapping[str, str]) -> tuple[float, float]:
    unit = {"centimeter": 10_000.0, "inch": 25_400.0}.get(properties.get("tiff.ResolutionUnit", "").lower())
    across, down = _pair(properties, "tiff.XResolution", "tiff.YResolution")
    if unit is None or not (across > 0 and down > 0):
        return math.nan, math.nan
    return unit / across, unit / down


def resolution(properties: Mapping[str, str]) -> Resolution | None:
    """µm per pixel of level 0 from a slide's properties, or ``None``; never guessed from a magnification.

    The first that is usable of ``openslide.mpp-x/y``, ``aperio.MPP``, ``hamamatsu.XResolution`` (nm per pixel would be
    out of range), ``philips.DICOM_PIXEL_SPACING`` (mm) and ``tiff.XResolution`` with its unit.

    Args:
        properties: OpenSlide's, strings by name.
    """
    spacing = [part.strip('"') for part in properties.get("philips.DICOM_PIXEL_SPACING", "").split()]
    philips = {"x": spacing[1], "y": spacing[0]} if len(spacing) == 2 else {}
    chain = {
        "openslide.mpp": _pair(properties, "openslide.mpp-x", "openslide.mpp-y"),
        "aperio.MPP": _pair(properties, "aperio.MPP", "aperio.MPP"),
        "hamamatsu.XResolution": _pair(properties, "hamamatsu.XResolution", "hamamatsu.YResolution"),
        "philips.DICOM_PIXEL_SPACING": _pair(philips, "x", "y", 1000.0),
        "tiff.XResolution": _tiff(properties),
    }
    for source, (across, down) in chain.items():
        if all(MPP_RANGE[0] <= value <= MPP_RANGE[1] for value in (across, down)):
            return Resolution(across, down, source)
    return None
