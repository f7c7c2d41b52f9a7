"""One whole-slide image, opened with OpenSlide: its resolution, and patches that are what the scanner saw or nothing.

OpenSlide errors latch: after one, every further call on that handle fails. So a failed read closes the slide, opens it
again and is tried once more; a patch that fails twice is dropped and counted, never replaced by white or black pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openslide
from PIL import Image, ImageCms

from latent_medi.errors import UserError

EXTENSIONS = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".svslide", ".bif", ".czi")
"""File endings taken for slides in a folder; OpenSlide decides what they are. Not ``.dcm``: a DICOM slide is many
files, each of which opens the whole; name one of them in a table.
"""
CACHE_BYTES = 64 * 2**20
MPP_RANGE = (0.05, 20.0)
"""µm per pixel beyond which a value is taken for a placeholder, such as the 72 dpi that image programs write."""
_SLACK = 1e-3  # pixels of a region that rounding may account for
_BLOCK_EDGE = 2048  # pixels of a level that a thumbnail reads at once
LEVEL_TOLERANCE = 0.02
"""Share by which a level may be coarser than asked for and still be taken as equal."""


class SlideError(Exception):
    """A slide that cannot be used; the message is the reason that the quality table gives."""


class SlideSkipped(SlideError):
    """A slide that is whole, but not what was asked for: no resolution, or too coarse."""


class PatchError(Exception):
    """A region that could not be read twice in a row."""


@dataclass(frozen=True)
class Resolution:
    """µm per pixel at level 0 along both axes, and which property said so."""

    x: float
    y: float
    source: str


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
    """µm per pixel of level 0 from a slide's properties, or ``None``: it is never guessed from a magnification.

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


class Slide:
    """A slide from which patches of one physical size are cut. Use as a context manager.

    Args:
        path: The slide's file.
        mpp: µm per pixel of level 0 to use instead of what the file says; ``None`` to ask the file.
        srgb: Whether to convert colours from the slide's ICC profile to sRGB; otherwise pixels stay as the scanner
            delivered them, whatever profile is embedded.

    Raises:
        SlideError: OpenSlide cannot read it.
        SlideSkipped: It does not say its resolution.
    """

    def __init__(self, path: str | Path, mpp: float | None = None, srgb: bool = False) -> None:
        self.path = Path(path)
        self._handle: Any = self._open()
        try:
            self.properties: dict[str, str] = dict(self._handle.properties)
            found = Resolution(mpp, mpp, "override") if mpp is not None else resolution(self.properties)
            if found is None:
                power = self.properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER, "")
                told = f" (its objective power, {power}, does not tell)" if power else ""
                raise SlideSkipped(f"no resolution in µm per pixel{told}: give it in mpp_table")
            self.mpp = found
            background = self.properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR, "ffffff")
            self.background = tuple(int(background[i : i + 2], 16) for i in (0, 2, 4))
            self.size: tuple[int, int] = self._handle.dimensions
            self.downsamples: tuple[float, ...] = tuple(self._handle.level_downsamples)
            self._levels = self._handle.level_dimensions
            self.profile = self._handle.color_profile
            self._transform: Any = None
            if srgb and self.profile is not None:
                self._transform = ImageCms.buildTransform(self.profile, ImageCms.createProfile("sRGB"), "RGB", "RGB")
        except openslide.OpenSlideError as error:
            self.close()
            raise SlideError(f"OpenSlide cannot read it: {error}") from None
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        try:
            with open(self.path, "rb") as file:
                start = file.read(4)
        except OSError as error:
            raise SlideError(f"cannot be opened: {error.strerror}") from None
        if not start:
            raise SlideError("the file is empty")
        try:
            handle = openslide.OpenSlide(str(self.path))
        except openslide.OpenSlideUnsupportedFormatError:
            raise SlideError("not a slide: OpenSlide does not know the format") from None
        except (openslide.OpenSlideError, OSError) as error:
            raise SlideError(f"OpenSlide cannot open it: {error}") from None
        handle.set_cache(openslide.OpenSlideCache(CACHE_BYTES))
        return handle

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the slide's file; closing twice is no error."""
        if self._handle is not None:
            self._handle.close()
        self._handle = None

    def level_for(self, downsample: float) -> int:
        """The coarsest level that is not coarser than ``downsample`` (within :data:`LEVEL_TOLERANCE`)."""
        fine = [i for i, have in enumerate(self.downsamples) if have <= downsample * (1 + LEVEL_TOLERANCE)]
        return max(fine, key=lambda i: self.downsamples[i], default=0)

    def _region(self, x: int, y: int, level: int, size: tuple[int, int]) -> Image.Image:
        """RGB of a region; where the slide has no tile (transparent), the slide's own background colour."""
        for attempt in (1, 2):
            try:
                if self._handle is None:  # after an error, even one of opening again
                    self._handle = self._open()
                region = self._handle.read_region((x, y), level, size)
                break
            except (openslide.OpenSlideError, OSError, SlideError) as error:
                self.close()
                if attempt == 2:
                    raise PatchError(str(error)) from None
        image = Image.new("RGB", region.size, self.background)
        image.paste(region, mask=region.getchannel("A"))
        if self._transform is not None:
            ImageCms.applyTransform(image, self._transform, inPlace=True)
        return image

    def patch(self, x: int, y: int, patch_size: int, mpp: float) -> np.ndarray:
        """A patch of ``patch_size × mpp`` µm along both axes, from the nearest finer level, antialiased (Lanczos).

        Args:
            x: Left edge in level-0 pixels.
            y: Top edge in level-0 pixels.
            patch_size: Edge in pixels.
            mpp: µm per pixel of the patch, not finer than level 0's.

        Returns:
            uint8 [patch_size, patch_size, 3].

        Raises:
            PatchError: It could not be read twice in a row.
        """
        across, down = mpp / self.mpp.x, mpp / self.mpp.y
        level = self.level_for(min(across, down))
        # Downsamples are no whole numbers in general (2.0005): sizes stay fractions until the resize takes its box.
        width, height = (patch_size * scale / self.downsamples[level] for scale in (across, down))
        whole = (max(1, math.ceil(width - _SLACK)), max(1, math.ceil(height - _SLACK)))
        image = self._region(x, y, level, whole)
        if max(abs(width - patch_size), abs(height - patch_size)) <= _SLACK:
            return np.asarray(image)  # within rounding of a resolution or downsample nothing is interpolated
        box = (0.0, 0.0, min(width, whole[0]), min(height, whole[1]))
        return np.asarray(image.resize((patch_size, patch_size), Image.Resampling.LANCZOS, box=box))

    def thumbnail(self, mpp: float) -> np.ndarray:
        """The whole slide at about ``mpp`` µm per pixel, uint8 [h, w, 3].

        Raises:
            PatchError: It could not be read.
        """
        width = max(1, round(self.size[0] * self.mpp.x / mpp))
        height = max(1, round(self.size[1] * self.mpp.y / mpp))
        level = self.level_for(min(mpp / self.mpp.x, mpp / self.mpp.y))
        across, down = self._levels[level][0] / width, self._levels[level][1] / height
        out = np.empty((height, width, 3), np.uint8)
        # In blocks, since a slide without coarse levels does not fit memory as a whole.
        step = max(1, int(_BLOCK_EDGE / max(across, down)))
        for top in range(0, height, step):
            for left in range(0, width, step):
                rows, columns = min(step, height - top), min(step, width - left)
                x, y = left * across, top * down
                size = (math.ceil(columns * across + x % 1 - 1e-6), math.ceil(rows * down + y % 1 - 1e-6))
                corner = (int(int(x) * self.downsamples[level]), int(int(y) * self.downsamples[level]))
                block = self._region(*corner, level, size)
                box = (x % 1, y % 1, min(x % 1 + columns * across, size[0]), min(y % 1 + rows * down, size[1]))
                small = block.resize((columns, rows), Image.Resampling.BOX, box=box)
                out[top : top + rows, left : left + columns] = np.asarray(small)
        return out


def find_slides(folder: str | Path) -> list[Path]:
    """Every file below ``folder`` whose ending is a slide's, sorted by path.

    Raises:
        UserError: There is no such folder, or no slide in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.", "Give a folder of slides, or a table that names them.")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.is_dir())
    if not found:
        raise UserError(f"{folder} holds no slide ({', '.join(EXTENSIONS)}).")
    return found
