"""The work on one slide, in a process of its own that can be killed: ``python -m latent_medi.shards.slides.job JOB``.

The parent gives a JSON file with a :class:`SlideJob` and reads the outcome from another; whatever a slide does to the
process (a crash inside a codec, memory, a read that never returns), the parent and the other slides go on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from latent_medi.core.files import NO_SPACE, atomic_path, write_json
from latent_medi.core.processes import end_with
from latent_medi.shards.slides.slide import LEVEL_TOLERANCE, PatchError, Slide, SlideError, SlideSkipped
from latent_medi.shards.slides.tissue import THUMBNAIL_MPP, tissue_mask, tissue_share, why_no_tissue
from latent_medi.shards.writing.patch import Patch
from latent_medi.shards.writing.writer import write_shard

WHITE, BLACK = 235, 25
"""Brightness (0 to 255) from which a pixel is near-white, and up to which it is near-black."""
REJECTIONS = ("tissue", "white", "black", "blur", "unreadable")
_WORDS = {
    "white": "near-white (max_white)", "black": "near-black (max_black)", "blur": "blurred (min_sharpness)",
    "unreadable": "unreadable",
}  # fmt: skip
_HOPELESS = 20  # unreadable patches after which their share is looked at while the slide is being read
_TRIAL = 8  # patches that a dry run reads to estimate bytes and time
_SHEET_EDGE = 1200  # pixels of a contact sheet's longer side


@dataclass
class SlideJob:
    """One slide, what is known of it, and how to cut it.

    Args:
        path: The slide's file.
        key: Prefix of its patches' keys: unique, without a dot.
        patient: Its patient.
        fields: A value by field of the schema.
        extra: Further columns.
        mpp_override: µm per pixel of level 0, or ``None`` to ask the file.
        folder: Dataset folder.
        number: Number of its shard.
        token: What the shard is made from.
        sheet: PNG of the contact sheet to write; ``""`` for none.
        memory: GiB that the process may use.
        corners: Left top corners of the patches that were cut before, level-0 pixels [n, 2]: only the contact sheet is
            to be drawn; ``None`` to cut.
        patch_size, mpp, overlap, min_tissue, max_patches, max_white, max_black, min_sharpness, icc, codec, seed,
            max_unreadable, dry_run: As in :class:`~latent_medi.shards.settings.SlideSettings`.
    """

    path: str
    key: str
    patient: str
    patch_size: int
    mpp: float
    fields: dict[str, str] = field(default_factory=dict)
    extra: dict[str, str] = field(default_factory=dict)
    mpp_override: float | None = None
    folder: str = ""
    number: int = 0
    token: str = ""
    sheet: str = ""
    memory: float = 0.0
    corners: list[list[int]] | None = None
    overlap: float = 0.0
    min_tissue: float = 0.5
    max_patches: int = 0
    max_white: float = 0.8
    max_black: float = 0.3
    min_sharpness: float = 0.0
    icc: str = "ignore"
    codec: str = "png"
    seed: int = 0
    max_unreadable: float = 0.1
    dry_run: bool = False


def grid(size: tuple[int, int], footprint: tuple[float, float], overlap: float) -> np.ndarray:
    """Left top corners of a row-major grid of patches that lie wholly inside, int64 [n, 2] in level-0 pixels.

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


def rejection(patch: np.ndarray, job: SlideJob) -> str:
    """Why a patch is not wanted (white, black, blur), or ``""``."""
    brightness = patch.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    if job.max_white < 1 and (brightness >= WHITE).mean() > job.max_white:
        return "white"
    if job.max_black < 1 and (brightness <= BLACK).mean() > job.max_black:
        return "black"
    if job.min_sharpness > 0 and float(ndimage.laplace(brightness).var()) < job.min_sharpness:
        return "blur"
    return ""


class _Cutter:
    """Chooses, reads and counts the patches of one slide."""

    def __init__(self, slide: Slide, job: SlideJob) -> None:
        self.slide, self.job = slide, job
        self.start = time.monotonic()
        scale = (job.mpp / slide.mpp.x, job.mpp / slide.mpp.y)
        if min(scale) < 1 / (1 + LEVEL_TOLERANCE):
            raise SlideSkipped(
                f"coarser than the patches' {job.mpp:g} µm per pixel: {slide.mpp.x:.4g} × {slide.mpp.y:.4g}"
            )
        self.footprint = (job.patch_size * scale[0], job.patch_size * scale[1])
        corners = grid(slide.size, self.footprint, job.overlap)
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
        inside, self.most_tissue = shares >= job.min_tissue, float(shares.max())
        self.candidates = corners[inside]
        self.counts = dict.fromkeys(REJECTIONS, 0) | {"tissue": int((~inside).sum())}
        self.errors: list[str] = []
        self.kept: list[tuple[int, int]] = []
        self.read = 0

    def patches(self) -> Iterator[Patch]:
        """Patches until the slide's cap is reached; in each round the next ones of the shuffle in row-major order."""
        job = self.job
        order = shuffled(len(self.candidates), job.seed, job.key)
        wanted, taken = job.max_patches or len(order), 0
        while taken < len(order) and len(self.kept) < wanted:
            chosen = np.sort(order[taken : taken + wanted - len(self.kept)])
            taken += len(chosen)
            for x, y in self.candidates[chosen].tolist():
                image = self.one(x, y)
                if image is None:
                    continue
                self.kept.append((x, y))
                yield Patch(
                    f"{job.key}/{x}_{y}", image, job.patient, job.key, x, y, self.slide.mpp.x, job.fields,
                    extra=job.extra,
                )  # fmt: skip
        self.check_readable()

    def one(self, x: int, y: int) -> np.ndarray | None:
        """The patch, or ``None`` if it is rejected or unreadable, which is counted.

        Raises:
            SlideError: Too many were unreadable.
        """
        job = self.job
        self.read += 1
        try:
            image = self.slide.patch(x, y, job.patch_size, job.mpp)
        except PatchError as error:
            self.counts["unreadable"] += 1
            self.errors.append(str(error))
            if self.counts["unreadable"] >= _HOPELESS:
                self.check_readable()
            return None
        why = rejection(image, job)
        if why:
            self.counts[why] += 1
            return None
        return image

    def check_readable(self) -> None:
        """Give the slide up if too large a share of what was read so far was unreadable.

        Raises:
            SlideError: It was.
        """
        bad = self.counts["unreadable"]
        if bad > self.job.max_unreadable * self.read:
            raise SlideError(f"too many unreadable patches: {bad} of {self.read}, the last: {self.errors[-1]}")

    def why_none(self) -> str:
        """Why no patch was kept, in words that tell the reasons apart: what stands before the colon is one of a few."""
        if self.read:
            counts = ", ".join(f"{self.counts[why]} {_WORDS[why]}" for why in _WORDS if self.counts[why])
            return f"no patch passed: of {self.read} with tissue, {counts}"
        if self.mask.any():
            have, want = (f"{100 * share:.3g} %" for share in (self.most_tissue, self.job.min_tissue))
            return f"no patch with enough tissue: at most {have} of one is tissue, min_tissue asks for {want}"
        why = why_no_tissue(self.thumbnail)
        inverted = self.slide.tags is not None and self.slide.tags.white_is_zero
        return why.replace("grey:", "grey, stored inverted (MINISWHITE):") if inverted else why

    def try_sheet(self) -> str:
        """Draw the contact sheet, if one is wanted; why not, if that failed: a picture is no reason to lose a slide."""
        if self.job.sheet:
            try:
                self.sheet(Path(self.job.sheet))
            except (ValueError, MemoryError) as error:
                return f"no contact sheet: {error or type(error).__name__}"
        return ""

    def sheet(self, path: Path) -> None:
        """The thumbnail with the mask's outline and the kept patches."""
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


def run(job: SlideJob) -> dict[str, Any]:
    """Cut one slide.

    Returns:
        A row of the quality table: status ("kept", "empty", "skipped", "quarantined"; of a dry run "estimated", of a
        contact sheet alone "drawn"), reason, resolution, level, counts, seconds.
    """
    start = time.monotonic()
    row: dict[str, Any] = {"slide": job.key, "path": job.path, "status": "quarantined", "reason": ""}
    try:
        with Slide(job.path, job.mpp_override, job.icc == "srgb") as slide:
            level = slide.level_for(min(job.mpp / slide.mpp.x, job.mpp / slide.mpp.y))
            row |= {
                "mpp_x": slide.mpp.x, "mpp_y": slide.mpp.y, "mpp_from": slide.mpp.source, "level": level,
                "downsample": slide.downsamples[level], "width": slide.size[0], "height": slide.size[1],
                "icc_profile": slide.profile is not None,
            }  # fmt: skip
            cutter = _Cutter(slide, job)
            row["candidates"] = len(cutter.candidates)
            if job.corners is not None:
                cutter.kept = [(x, y) for x, y in job.corners]
                row |= {"status": "drawn", "reason": cutter.try_sheet()}
            elif job.dry_run:
                row |= _estimate(cutter, job)
            else:
                _cut(cutter, job, row)
            row |= {f"rejected_{why}": count for why, count in cutter.counts.items()}
    except SlideError as error:
        row |= {"reason": str(error), "status": "skipped" if isinstance(error, SlideSkipped) else "quarantined"}
    except MemoryError:
        row["reason"] = f"it needs more than {job.memory:g} GiB of memory"
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        row |= {"status": "failed", "reason": "the disk is full"}  # no fault of the slide: the parent stops
    row["seconds"] = round(time.monotonic() - start, 2)
    return row


def _cut(cutter: _Cutter, job: SlideJob, row: dict[str, Any]) -> None:
    """Write the shard, if there is a patch, and the contact sheet; the outcome becomes part of the row."""
    patches = cutter.patches()
    first = next(patches, None)
    if first is None:
        row |= {"kept": 0, "status": "empty", "reason": cutter.why_none()}
        cutter.try_sheet()
        return
    notes: dict[str, Any] = {}
    all_of_them = _noting(chain([first], patches), notes, cutter, row)
    record = write_shard(job.folder, job.number, all_of_them, job.codec, job.token, notes)
    row |= {**notes["row"], "bytes": record.size}


def _noting(patches: Iterable[Patch], notes: dict[str, Any], cutter: _Cutter, row: dict[str, Any]) -> Iterator[Patch]:
    """The patches; once all were taken, what was counted becomes part of the shard's record.

    The contact sheet is drawn before the shard is there: where there is a shard, a rerun looks at the slide no more.
    """
    yield from patches
    told = {"kept": len(cutter.kept), "status": "kept", "reason": cutter.try_sheet()}
    counts = {f"rejected_{why}": count for why, count in cutter.counts.items()}
    notes["row"] = {**row, **counts, **told, "seconds": round(time.monotonic() - cutter.start, 2)}


def _estimate(cutter: _Cutter, job: SlideJob) -> dict[str, Any]:
    """Patches, bytes and seconds from a few patches that are read and encoded."""
    from latent_medi.shards.format.codec import encode_image

    trial = cutter.candidates[np.sort(shuffled(len(cutter.candidates), job.seed, job.key)[:_TRIAL])]
    start, sizes = time.monotonic(), []
    for x, y in trial.tolist():
        image = cutter.one(x, y)
        if image is not None:
            sizes.append(len(encode_image(image, job.codec)))
    each = (time.monotonic() - start) / max(len(trial), 1)
    share = len(sizes) / max(len(trial), 1)
    patches = round(min(len(cutter.candidates) * share, job.max_patches or math.inf))
    reason = "" if patches else cutter.why_none()
    return {
        "status": "estimated" if len(trial) else "empty", "reason": reason, "kept": patches,
        "bytes": round(patches * (np.mean(sizes) if sizes else 0)),
        "estimated_seconds": round(patches / share * each, 1) if share else 0.0,
    }  # fmt: skip


def limit_memory(gib: float) -> None:
    """Let this process allocate at most ``gib`` GiB; what is beyond raises :class:`MemoryError`."""
    import resource

    if gib > 0:
        resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), int(gib * 2**30)))


def main() -> None:
    """Read a job, do it, write its row."""
    path = Path(sys.argv[1])
    job = SlideJob(**json.loads(path.read_text(encoding="utf-8")))
    limit_memory(job.memory)
    end_with(int(sys.argv[2]))
    row = run(job)
    write_json(path.with_suffix(".row.json"), row)


def write_job(job: SlideJob, path: Path) -> None:
    """Write a job for :func:`main`."""
    write_json(path, dataclasses.asdict(job))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
