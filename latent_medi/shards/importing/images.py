"""Patch images of a table or folder into a dataset folder: bad images are named and left out, never replaced."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from latent_medi.core.errors import UserError
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import progress
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.tables import read_table, say_what_is_left
from latent_medi.shards.checking.duplicates import allowed
from latent_medi.shards.dataset import INFO_FILE, PatchDataset
from latent_medi.shards.format.codec import check_header, decode_image, open_image
from latent_medi.shards.importing.image_file import check_file, image_path, read_image, unreadable
from latent_medi.shards.importing.image_table import (
    columns_taken,
    given_split,
    image_rows,
    images_as_patients,
    list_images,
)
from latent_medi.shards.importing.rejected import Rejected, recorded, report_rejected, smaller_than
from latent_medi.shards.importing.workers import dispatch
from latent_medi.shards.settings import ImportSettings
from latent_medi.shards.writing.finish import Description, Splits, finish_dataset, finished_dataset
from latent_medi.shards.writing.patch import Patch
from latent_medi.shards.writing.records import kept_shards
from latent_medi.shards.writing.rewrite import prepare_rewrite
from latent_medi.shards.writing.writer import write_shard

TOLERANCE = 0.02
"""Share by which a resolution or a field of view may differ and still be taken as equal."""


def import_images(
    settings: ImportSettings,
    table: pd.DataFrame | None = None,
    schema: Schema | None = None,
    provenance: Mapping[str, Any] | None = None,
    splits: Splits | None = None,
) -> PatchDataset:
    """Write a dataset folder from images named in a table.

    With ``mpp`` given, the middle of each image is cut so that a patch covers ``patch_size × mpp`` µm, or with ``tile``
    as many patches as fit next to each other; without, each image is stored whole. Either way it is scaled down with an
    antialiasing Lanczos filter, never up. Images that cannot be decoded, are not 8-bit RGB, too small or (stored whole)
    not square or of another resolution are logged, a line per reason, and listed by name in
    ``provenance["rejected"]``. A rerun keeps the shards whose images and settings have not changed.

    Args:
        settings: See :class:`ImportSettings`.
        table: The table, if it is not to be read from ``settings.table``; cells are strings.
        schema: The fields, if the vocabulary exists already; by default made from the table.
        provenance: Where the images come from.
        splits: Named splits by patient.

    Raises:
        UserError: The table lacks what the settings name, a patient is in two parts of its ``split_column``, or more
            than ``max_bad`` of the images are bad.
    """
    left_out: list[Rejected] = []
    if table is None and settings.folder:
        table, settings, left_out = list_images(settings)
    if table is None:
        if not settings.table:
            hint = "table=/path/to/manifest.csv, or folder=… with pattern=…"
            raise UserError("No table or folder of images is given.", hint)
        table = read_table(settings.table)
    if not settings.out:
        raise UserError("No dataset folder to write is given.", "out=/path/to/dataset")
    if settings.tile and not settings.mpp:
        raise UserError("Images are to be tiled, but the resolution of a patch is not given.", "mpp=… in µm per pixel")
    with output_lock(settings.out):
        if settings.patient_is == "image":
            table, settings = images_as_patients(table, settings)
        patients = set(table[settings.patient_column].astype(str)) if settings.patient_column in table else set()
        rows, kept, unusable = image_rows(table, settings)
        table, left_out = table.iloc[kept], left_out + unusable
        if schema is None:
            columns = (settings.class_field or None, settings.categorical, settings.continuous, settings.units)
            schema = Schema.from_table(table, *columns)
        schema.encode(table)
        splits = {**(splits or {}), **({"main": given_split(table, settings)} if settings.split_column else {})}
        more = allowed(settings.allow_duplicates)
        splits = {name: (parts, {**recipe, **more}) for name, (parts, recipe) in splits.items()}
        root = Path(settings.root) if settings.root else Path(settings.table).parent if settings.table else Path()
        root = root.resolve()  # a process elsewhere has another working folder
        mpp = settings.mpp or _whole_mpp(rows, root, settings)
        geometry = _Geometry(settings.patch_size, mpp, bool(settings.mpp), settings.tile)
        name = settings.name or Path(settings.out).name
        about = Description(
            name, schema, settings.patch_size, mpp, settings.codec, provenance or {}, splits, settings.patient_is
        )
        made = _import(settings, about, _Work(rows, root, geometry, settings.codec), left_out, patients)
    if settings.table:  # a recipe's own table has what it needs
        say_what_is_left(table, columns_taken(settings), f"The table {settings.table}")
    return made


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """How an image becomes patches: edge in pixels, µm per pixel, whether the middle is cut out, or many are tiled."""

    patch_size: int
    mpp: float
    cut: bool
    tile: bool = False

    def apply(self, image: np.ndarray, source_mpp: float) -> list[tuple[int, int, np.ndarray]]:
        """The patches of an image: left and top edge in its pixels, and uint8 [patch_size, patch_size, 3].

        Raises:
            UserError: The image does not hold such a patch.
        """
        height, width = image.shape[:2]
        edge, pixels = min(height, width), f"{width} × {height} px"
        if _too_small(edge, self.patch_size):
            raise UserError(f"{smaller_than(self.patch_size)}: {pixels}")
        side = self.patch_size * self.mpp / source_mpp
        if self.patch_size > side * (1 + TOLERANCE):
            raise UserError(f"would have to be enlarged from {source_mpp:g} to {self.mpp:g} µm per pixel")
        if side > edge * (1 + TOLERANCE):
            covered, wanted = edge * source_mpp, self.patch_size * self.mpp
            raise UserError(f"covers {covered:.4g} µm, and a patch {wanted:.4g} µm: {pixels}")
        if not self.cut:
            if height != width:
                raise UserError(f"is not square: {pixels}")
            if side < edge * (1 - TOLERANCE):
                stored = edge * source_mpp / self.patch_size
                raise UserError(f"has {stored:.4g} µm per stored pixel, not {self.mpp:.4g}")
            side = edge
        # Within rounding of the whole edge or of whole pixels nothing is interpolated.
        side = min(side, edge)
        side = round(side) if abs(side - round(side)) < 1e-6 else side
        corners = [((width - side) / 2, (height - side) / 2)]
        if self.tile:
            counts = [int((length + 1e-6) // side) for length in (width, height)]
            corners = [(column * side, row * side) for row in range(counts[1]) for column in range(counts[0])]
        if side == self.patch_size:
            corners = [(int(left), int(top)) for left, top in corners]
        picture, size = Image.fromarray(image), (self.patch_size, self.patch_size)
        return [
            (int(x), int(y), np.asarray(picture.resize(size, Image.Resampling.LANCZOS, box=(x, y, x + side, y + side))))
            for x, y in corners
        ]


@dataclasses.dataclass(frozen=True)
class _Work:
    """Images, or those of one shard, and how they become patches. Processes elsewhere are given it."""

    rows: list[dict[str, Any]]
    root: Path
    geometry: _Geometry
    codec: str

    def token(self) -> str:
        """SHA-256 over everything that decides the bytes of a shard of these images."""
        parts = [self.rows, dataclasses.asdict(self.geometry), self.codec]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for row in self.rows:
            try:
                digest.update(hashlib.sha256(read_image(self.root, row["path"])).digest())
            except OSError as error:
                digest.update(type(error).__name__.encode())
        return digest.hexdigest()

    def write(self, out: Path, number: int, token: str) -> tuple[bool, list[Rejected]]:
        """Write the images as one shard: whether there is one (not if all are bad), and the bad ones."""
        patches, bad = [], []
        for row in self.rows:
            try:
                cut = self.geometry.apply(decode_image(read_image(self.root, row["path"])), row["source_mpp"])
            except UserError as error:
                bad.append(Rejected(row["path"], error.message, error.hint))
            except OSError as error:
                bad.append(unreadable(self.root, row["path"], error))
            else:
                known = {name: value for name, value in row.items() if name not in ("path", "key", "x", "y")}
                for x, y, image in cut:
                    # A patch has a place in the slide only if the image has; a tile's key holds its place in the image.
                    key = f"{row['key']}/{x}_{y}" if self.geometry.tile else row["key"]
                    placed = row["x"] >= 0 and row["y"] >= 0
                    left, top = (row["x"] + x, row["y"] + y) if placed else (-1, -1)
                    patches.append(Patch(key=key, image=image, x=left, y=top, **known))
        if patches:
            notes = {"rejected": [entry._asdict() for entry in bad]}
            write_shard(out, number, patches, self.codec, token, notes)
        return bool(patches), bad


def _import(
    settings: ImportSettings, about: Description, work: _Work, left_out: list[Rejected], patients: set[str]
) -> PatchDataset:
    """Write the shards and the dataset, unless it is there already."""
    rows, out, per_shard = work.rows, Path(settings.out).resolve(), settings.patches_per_shard
    shards = [dataclasses.replace(work, rows=rows[i : i + per_shard]) for i in range(0, len(rows), per_shard)]
    jobs, dask = settings.jobs, settings.dask
    hashes = dispatch(_Work.token, [(shard,) for shard in shards], jobs, dask)
    tokens = list(progress(hashes, len(rows), "reading images", "images", per_shard))
    whole = finished_dataset(out, about, tokens)
    if whole and whole.info["provenance"]["rejected"].get("left_out", 0) == len(left_out):
        return whole
    if (out / INFO_FILE).is_file():
        absent = [row["path"] for row in rows if not image_path(work.root, row["path"]).exists()]
        if len(absent) > settings.max_bad * len(rows):
            problem = f"{len(absent)} of {len(rows)} images do not exist, such as {absent[0]}; {out} is not changed."
            raise UserError(problem, "Check root, or whether a disk is connected.")
    prepare_rewrite(out, about.splits, [(row["patient"], row["fields"]) for row in rows])
    kept = kept_shards(out, tokens)
    rejected = {number: [Rejected(**e) for e in record.notes["rejected"]] for number, record in kept.items()}
    todo = [number for number in range(len(shards)) if number not in kept]
    results = dispatch(_Work.write, [(shards[n], out, n, tokens[n]) for n in todo], jobs, dask)
    written = set(kept)
    sizes = [len(shards[number].rows) for number in todo]
    shown = progress(results, len(rows), f"writing {about.name}", "images", sizes, before=len(rows) - sum(sizes))
    for number, (stored, bad) in zip(todo, shown, strict=True):
        rejected[number] = bad
        written |= {number} if stored else set()
    bad = [entry for number in sorted(rejected) for entry in rejected[number]]
    report_rejected(bad, left_out, len(rows), settings, out)
    provenance = dict(about.provenance) | {"rejected": recorded(bad, left_out, len(rows))}
    # A patient whose every image was rejected is in no split.
    bad_rows, all_rows = Counter(entry.image for entry in bad), Counter(row["path"] for row in rows)
    gone = patients - {row["patient"] for row in rows if bad_rows[row["path"]] < all_rows[row["path"]]}
    splits = {
        name: ({patient: part for patient, part in parts.items() if patient not in gone}, recipe)
        for name, (parts, recipe) in about.splits.items()
    }
    return finish_dataset(out, dataclasses.replace(about, provenance=provenance, splits=splits), written)


def _too_small(edge: int, patch_size: int) -> bool:
    return patch_size > edge * (1 + TOLERANCE)


def _whole_mpp(rows: list[dict[str, Any]], root: Path, settings: ImportSettings) -> float:
    """µm per stored pixel when images are stored whole: that of the first one that can be read and is large enough.

    Raises:
        UserError: There is none; before any image is read, since nothing would come of it.
    """
    small: list[tuple[int, int]] = []
    bad: list[Rejected] = []
    readable = False
    for row in rows:
        try:
            size = _size(root, row["path"])
        except OSError as error:
            bad.append(unreadable(root, row["path"], error))
        except UserError as error:
            bad.append(Rejected(row["path"], error.message, error.hint))
            readable = True
        else:
            if not _too_small(min(size), settings.patch_size):
                return min(size) * row["source_mpp"] / settings.patch_size
            small.append(size)
    if small:
        (width, height), least = small[0], min(min(size) for size in small)
        fitting = least // 8 * 8 or least  # autoencoders halve it three times
        raise UserError(
            f"{len(small)} of {len(rows)} images are smaller than {settings.patch_size} px (the first is {width} × "
            f"{height} px); none is large enough.",
            f"Set patch_size={fitting}; images are never enlarged.",
        )
    what, first = "used" if readable else "read", f"{bad[0].image}: {bad[0].reason.rstrip('.')}"
    raise UserError(f"None of the {len(rows)} images can be {what}, such as {first}.", bad[0].remedy or "Check root.")


def _size(root: Path, name: str) -> tuple[int, int]:
    """Width and height of an image whose header says that it can be imported.

    Raises:
        OSError: It cannot be read.
        UserError: It is no image that is imported.
    """
    path = image_path(root, name)
    check_file(path)
    with open(path, "rb") as file, open_image(file) as image:
        check_header(image)
        return image.size
