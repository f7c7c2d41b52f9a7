"""The patches of one slide: a grid over its tissue, each patch read, checked and counted, and a contact sheet."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from latent_medi.core.files import atomic_path
from latent_medi.shards.settings import SlideSettings
from latent_medi.shards.slides.slide import LEVEL_TOLERANCE, PatchError, Slide, SlideError, SlideSkipped
from latent_medi.shards.slides.tissue import THUMBNAIL_MPP, tissue_mask, tissue_share, why_no_tissue
from latent_medi.shards.writing.patch import Patch

WHITE, BLACK = 235, 25
"""Brightness (0 to 255) from which a pixel is near-white, and up to which it is near-black."""
REJECTIONS = {
    "tissue": "without tissue (min_tissue)",
    "white": "near-white (max_white)",
    "black": "near-black (max_black)",
    "blur": "blurred (min_sharpness)",
    "unreadable": "unreadable",
}
"""Why patches are rejected, and the words for it."""
_HOPELESS = 20  # unreadable patches from which their share is checked while the slide is being read
_SHEET_EDGE = 1200  # pixels of a contact sheet's longer side


@dataclass
class SlideJob:
    """One slide, its metadata, and how to cut it.

    Args:
        path: The slide's file.
        key: Prefix of its patches' keys: unique, without a dot.
        patient: Its patient.
        settings: How to cut it.
        fields: A value by field of the schema.
        extra: Further columns.
        mpp: µm per pixel of level 0, or ``None`` to ask the file.
        folder: Dataset folder.
        number: Number of its shard.
        token: What the shard is made from.
        sheet: PNG of the contact sheet to write; ``""`` for none.
        corners: Left top corners of the patches that were cut before, level-0 pixels [n, 2], to draw only the contact
            sheet; ``None`` to cut.
    """

    path: str
    key: str
    patient: str
    settings: SlideSettings
    fields: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    mpp: float | None = None
    folder: str = ""
    number: int = 0
    token: str = ""
    sheet: str = ""
    corners: list[list[int]] | None = None


def grid(size: tuple[int, int], footprint: tuple[float, float], overlap: float) -> np.ndarray:
    """Left top corners of a row-major grid of patches that are wholly inside, int64 [n, 2] in level-0 pixels.

    Args:
        size: Width and height of level 0, pixels.
        footprint: Width and height of a patch, level-0 pixels (not whole in general).
        overlap: Share of a patch that its neighbour covers too.
    """
    corners = []
    for length, extent in zip(size, footprint, strict=True):
        step = extent * (1 - overlap)
        count = int((length - extent + 1e-6) // step) + 1 if extent <= length + 1e-6 else 0
        corners.append(np.floor(np.arange(count) * step + 1e-6).astype(np.int64))
    across, down = np.meshgrid(corners[0], corners[1])
    return np.stack([across.reshape(-1), down.reshape(-1)], axis=1)


def shuffled(count: int, seed: int, key: str) -> np.ndarray:
    """An order of ``count`` candidates that depends on the seed and the slide's name only."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little")).permutation(count)


def rejection(patch: np.ndarray, settings: SlideSettings) -> str:
    """Why a patch is rejected (white, black, blur), or ``""``."""
    brightness = patch.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    if settings.max_white < 1 and (brightness >= WHITE).mean() > settings.max_white:
        return "white"
    if settings.max_black < 1 and (brightness <= BLACK).mean() > settings.max_black:
        return "black"
    if settings.min_sharpness > 0 and float(ndimage.laplace(brightness).var()) < settings.min_sharpness:
        return "blur"
    return ""


class Cutter:
    """Chooses, reads and counts the patches of one slide."""

    def __init__(self, slide: Slide, job: SlideJob) -> None:
        self.slide, self.job, settings = slide, job, job.settings
        self.start = time.monotonic()
        scale = (settings.mpp / slide.mpp.x, settings.mpp / slide.mpp.y)
        if min(scale) < 1 / (1 + LEVEL_TOLERANCE):
            has = f"{slide.mpp.x:.4g} × {slide.mpp.y:.4g}"
            raise SlideSkipped(f"coarser than the patches' {settings.mpp:g} µm per pixel: {has}")
        self.footprint = (settings.patch_size * scale[0], settings.patch_size * scale[1])
        corners = grid(slide.size, self.footprint, settings.overlap)
        if not len(corners):
            raise SlideSkipped(
                f"smaller than a patch: {slide.size[0]} × {slide.size[1]} pixels of {slide.mpp.x:.4g} µm, "
                f"a patch takes {self.footprint[0]:.0f} × {self.footprint[1]:.0f}"
            )
        try:
            self.thumbnail = slide.thumbnail(THUMBNAIL_MPP)
        except PatchError as error:
            raise SlideError(f"no level can be read whole: {error}") from None
        self.mask = tissue_mask(self.thumbnail)
        to_mask = np.array([slide.mpp.x, slide.mpp.y]) / THUMBNAIL_MPP
        boxes = np.concatenate([corners * to_mask, (corners + np.array(self.footprint)) * to_mask], axis=1)
        shares = tissue_share(self.mask, boxes)
        inside, self.most_tissue = shares >= settings.min_tissue, float(shares.max())
        self.candidates = corners[inside]
        self.counts = dict.fromkeys(REJECTIONS, 0) | {"tissue": int((~inside).sum())}
        self.errors: list[str] = []
        self.kept: list[tuple[int, int]] = []
        self.read = 0

    def patches(self) -> Iterator[Patch]:
        """Patches until ``max_patches`` is reached; in each round the next ones of the shuffle in row-major order."""
        job = self.job
        order = shuffled(len(self.candidates), job.settings.seed, job.key)
        wanted, taken = job.settings.max_patches or len(order), 0
        while taken < len(order) and len(self.kept) < wanted:
            chosen = np.sort(order[taken : taken + wanted - len(self.kept)])
            taken += len(chosen)
            for x, y in self.candidates[chosen].tolist():
                image = self.one(x, y)
                if image is None:
                    continue
                self.kept.append((x, y))
                key, mpp = f"{job.key}/{x}_{y}", self.slide.mpp.x
                yield Patch(key, image, job.patient, job.key, x, y, mpp, job.fields, extra=job.extra)
        self.check_readable()

    def one(self, x: int, y: int) -> np.ndarray | None:
        """The patch, or ``None`` if it is rejected or unreadable; counts the reasons.

        Raises:
            SlideError: Too many were unreadable.
        """
        settings = self.job.settings
        self.read += 1
        try:
            image = self.slide.patch(x, y, settings.patch_size, settings.mpp)
        except PatchError as error:
            self.counts["unreadable"] += 1
            self.errors.append(str(error))
            if self.counts["unreadable"] >= _HOPELESS:
                self.check_readable()
            return None
        if why := rejection(image, settings):
            self.counts[why] += 1
        return None if why else image

    def check_readable(self) -> None:
        """Give up the slide if too large a share of the patches read so far was unreadable.

        Raises:
            SlideError: It was.
        """
        bad = self.counts["unreadable"]
        if bad > self.job.settings.max_unreadable * self.read:
            raise SlideError(f"too many unreadable patches: {bad} of {self.read}, the last: {self.errors[-1]}")

    def why_none(self) -> str:
        """Why no patch was kept; the text before the colon is one of a few kinds of reason."""
        if self.read:
            rejected = [why for why in REJECTIONS if why != "tissue" and self.counts[why]]
            counts = ", ".join(f"{self.counts[why]} {REJECTIONS[why]}" for why in rejected)
            return f"no patch passed: of {self.read} with tissue, {counts}"
        if self.mask.any():
            have, want = (f"{100 * share:.3g} %" for share in (self.most_tissue, self.job.settings.min_tissue))
            return f"no patch with enough tissue: at most {have} of one is tissue, min_tissue asks for {want}"
        why = why_no_tissue(self.thumbnail)
        inverted = self.slide.tags is not None and self.slide.tags.white_is_zero
        return why.replace("grey:", "grey, stored inverted (MINISWHITE):") if inverted else why

    def try_sheet(self) -> str:
        """Draw the contact sheet, if one is wanted; returns why that failed, since no slide is lost for a picture."""
        if self.job.sheet:
            try:
                self.sheet(Path(self.job.sheet))
            except (ValueError, MemoryError) as error:
                return f"no contact sheet: {error or type(error).__name__}"
        return ""

    def sheet(self, path: Path) -> None:
        """Draw the thumbnail with the mask's outline and the kept patches."""
        height, width = self.thumbnail.shape[:2]
        zoom = min(4.0, _SHEET_EDGE / max(width, height))
        size = (max(1, round(width * zoom)), max(1, round(height * zoom)))
        image = Image.fromarray(self.thumbnail).resize(size, Image.Resampling.LANCZOS)
        mask = np.asarray(Image.fromarray(self.mask).resize(size, Image.Resampling.NEAREST))
        edge = mask ^ ndimage.binary_erosion(mask)
        pixels = np.array(image)
        pixels[edge] = (0, 140, 60)
        image = Image.fromarray(pixels)
        draw = ImageDraw.Draw(image)
        to_sheet = np.array([self.slide.mpp.x, self.slide.mpp.y]) / THUMBNAIL_MPP * zoom
        for corner in self.kept:
            left, top = np.array(corner) * to_sheet
            right, bottom = (np.array(corner) + np.array(self.footprint)) * to_sheet
            box = (left, top, max(left, right - 1), max(top, bottom - 1))  # a patch may be less than a pixel here
            draw.rectangle(box, outline=(20, 60, 200))
        with atomic_path(path) as temporary:
            image.save(temporary)
