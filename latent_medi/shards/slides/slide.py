"""One whole-slide image, opened with OpenSlide: its resolution, and patches with the scanner's pixels or none.

After an error, every further call on an OpenSlide handle fails. So a failed read closes the slide, opens it again and
is tried once more; a patch that fails twice is dropped and counted, never replaced by white or black pixels.
"""

from __future__ import annotations

import math
import stat
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from latent_medi.core.errors import needs
from latent_medi.shards.importing.resolution import Resolution, resolution
from latent_medi.shards.slides.resize import lanczos
from latent_medi.shards.slides.tiff_tags import TiffTags, tiff_tags

with needs("Cutting slides", "openslide-python openslide-bin"):
    import openslide

CACHE_BYTES = 64 * 2**20
_SLACK = 1e-3  # pixels of a region by which rounding may change its size
_BLOCK_EDGE = 2048  # pixels of a level that a thumbnail reads at once
LEVEL_TOLERANCE = 0.02
"""Share by which a level may be coarser than requested and still be taken as equal."""


class SlideError(Exception):
    """A slide that cannot be used; the message is its reason in the quality table."""


class SlideSkipped(SlideError):
    """A slide without damage that cannot be cut: no resolution, too coarse, or stored in an unsupported way."""


class PatchError(Exception):
    """A region that could not be read twice in a row."""


def _check_samples(tags: TiffTags) -> None:
    """Refuse samples that OpenSlide would reduce to 8 bits, or cannot read.

    Raises:
        SlideSkipped: Names the samples and the conversion.
    """
    convert = "convert to 8 bits, vips linear IN OUT.tif[tile,pyramid,bigtiff]"
    if tags.floating:
        raise SlideSkipped(f"floating-point samples: {convert} 255 0 --uchar (if white is 1)")
    if tags.bits > 8:
        # No tag says how many of them are used: 12 bits in 16 would become near-black.
        raise SlideSkipped(f"{tags.bits} bits per sample: {convert} A 0 --uchar, A = 255 / white (12 bits: 255 / 4095)")


class Slide:
    """A slide from which patches of one physical size are cut. Use as a context manager.

    Args:
        path: The slide's file.
        mpp: µm per pixel of level 0 to use instead of the file's; ``None`` to read it from the file.
        srgb: Whether to convert colours from the slide's ICC profile to sRGB; otherwise pixels stay as the scanner
            delivered them, whatever profile is embedded.

    Raises:
        SlideError: OpenSlide cannot read it.
        SlideSkipped: It has no resolution, or is stored in a way that OpenSlide cannot read or would alter.
    """

    def __init__(self, path: str | Path, mpp: float | None = None, srgb: bool = False) -> None:
        self.path = Path(path)
        self.tags: TiffTags | None = None
        self._handle: Any = self._open()
        try:
            self.properties: dict[str, str] = dict(self._handle.properties)
            if self.properties.get(openslide.PROPERTY_NAME_VENDOR) != "hamamatsu":
                self.tags = tiff_tags(self.path)
            if self.tags is not None:
                _check_samples(self.tags)
            found = Resolution(mpp, mpp, "override") if mpp is not None else resolution(self.properties)
            if found is None:
                power = self.properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER, "")
                note = f" (its objective power, {power}, does not tell)" if power else ""
                raise SlideSkipped(f"no resolution in µm per pixel: give it in mpp_table{note}")
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
        except (openslide.OpenSlideError, OSError) as error:
            self.close()
            raise SlideError(f"OpenSlide cannot read it: {error}") from None
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        try:
            status = self.path.stat()
            if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for somebody to write, for ever
                raise SlideError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
            with open(self.path, "rb") as file:
                start = file.read(4)
        except OSError as error:
            raise SlideError(f"cannot be opened: {error.strerror}") from None
        if not start:
            raise SlideError("the file is empty")
        try:
            handle = openslide.OpenSlide(str(self.path))
        except openslide.OpenSlideUnsupportedFormatError:
            if (tags := tiff_tags(self.path)) is not None:
                _check_samples(tags)
                convert = "vips tiffsave IN OUT.tif --tile --pyramid --bigtiff"
                if not tags.tiled:
                    raise SlideSkipped(f"a TIFF in strips, not in tiles: convert it, {convert}") from None
                reason = f"a TIFF that OpenSlide does not read: cut off, or in another form ({convert})"
                raise SlideError(reason) from None
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
        """A region as RGB, with the slide's background colour where it has no tile (transparent)."""
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
        alpha = region.getchannel("A")
        if alpha.getextrema() == (255, 255):  # a fifth of the time, and all but a few regions are opaque
            image = region.convert("RGB")
        else:
            image = Image.new("RGB", region.size, self.background)
            image.paste(region, mask=alpha)
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
            return np.asarray(image)  # within rounding of a resolution or downsample, nothing is interpolated
        box = (0.0, 0.0, min(width, whole[0]), min(height, whole[1]))
        return lanczos(image, patch_size, box)

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
        # In blocks, since a slide without coarse levels does not fit in memory.
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
