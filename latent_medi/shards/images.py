"""A table of patch images into a dataset folder: each image is checked, and a bad one is named, never replaced."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from latent_medi.errors import UserError
from latent_medi.locks import output_lock
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.metadata.tables import read_table, require_columns, settings_of_columns
from latent_medi.progress import get_logger, progress
from latent_medi.shards.codec import check_codec, decode_image
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.dispatch import dispatch
from latent_medi.shards.patch import Patch, check_column, check_key
from latent_medi.shards.records import ShardRecord, begin, finished_shards
from latent_medi.shards.rejected import report_rejected, smaller_than
from latent_medi.shards.settings import ImportSettings
from latent_medi.shards.writer import finish_dataset, finished_dataset, write_shard

logger = get_logger(__name__)

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""Endings of the files that a folder is searched for."""
TOLERANCE = 0.02
"""Share by which a resolution or a field of view may be off and still be taken as equal."""
_COLUMN_SETTINGS = (
    "image_column", "patient_column", "slide_column", "key_column", "x_column", "y_column", "source_mpp_column",
    "split_column", "class_field", "categorical", "continuous", "extra",
)  # fmt: skip


def import_images(
    settings: ImportSettings,
    table: pd.DataFrame | None = None,
    schema: Schema | None = None,
    provenance: Mapping[str, Any] | None = None,
    splits: Mapping[str, tuple[Mapping[str, str], Mapping[str, Any]]] | None = None,
) -> PatchDataset:
    """Write a dataset folder from images named in a table.

    With ``mpp`` given, the middle of each image is cut so that a patch covers ``patch_size × mpp`` µm, or with ``tile``
    as many patches side by side as fit; without, each image is stored whole. Either way it is scaled down with an
    antialiasing Lanczos filter, never up. Images that cannot be decoded, are not 8-bit RGB, too small or (stored whole)
    not square or of another resolution are logged, a line per reason, and listed by name in
    ``provenance["rejected"]``. A rerun keeps the shards whose images and settings have not changed.

    Args:
        settings: See :class:`ImportSettings`.
        table: The table, if it is not to be read from ``settings.table``; cells are strings.
        schema: The fields, if the vocabulary exists already; by default made from the table.
        provenance: Where the images come from.
        splits: Named splits by patient, as for :func:`~latent_medi.shards.writer.finish_dataset`.

    Raises:
        UserError: The table does not have what the settings name, a patient is in two parts of its ``split_column``, or
            more than ``max_bad`` of the images are bad.
    """
    check_codec(settings.codec)
    if table is None and settings.folder:
        table, settings = _listed(settings)
    if table is None:
        if not settings.table:
            raise UserError(
                "No table or folder of images is given.", "table=/path/to/manifest.csv, or folder=… with pattern=…"
            )
        table = read_table(settings.table)
    if not settings.out:
        raise UserError("No dataset folder to write is given.", "out=/path/to/dataset")
    if settings.patch_size < 1 or settings.patches_per_shard < 1 or not 0 <= settings.max_bad <= 1:
        raise UserError("patch_size and patches_per_shard are at least 1, and max_bad is between 0 and 1.")
    with output_lock(settings.out):
        return _import(settings, table, schema, provenance, splits)


def _import(
    settings: ImportSettings,
    table: pd.DataFrame,
    schema: Schema | None,
    provenance: Mapping[str, Any] | None,
    splits: Mapping[str, tuple[Mapping[str, str], Mapping[str, Any]]] | None,
) -> PatchDataset:
    rows = _rows(table, settings)
    if settings.split_column:
        splits = {**(splits or {}), "main": _given_split(table, settings)}
    if schema is None:
        continuous, units = settings.continuous, settings.units
        schema = Schema.from_table(table, settings.class_field or None, settings.categorical, continuous, units)
    schema.encode(table)
    root = Path(settings.root) if settings.root else Path(settings.table).parent if settings.table else Path()
    # Absolute, as a process elsewhere has another working folder.
    root, out, name = root.resolve(), Path(settings.out).resolve(), settings.name or Path(settings.out).name
    if settings.tile and not settings.mpp:
        raise UserError("Images are to be tiled, but the resolution of a patch is not given.", "mpp=… in µm per pixel")
    geometry = _Geometry(
        settings.patch_size, settings.mpp or _whole_mpp(rows, root, settings), bool(settings.mpp), settings.tile
    )

    chunks = [rows[i : i + settings.patches_per_shard] for i in range(0, len(rows), settings.patches_per_shard)]
    codec, jobs, dask = settings.codec, settings.jobs, settings.dask
    hashes = dispatch(_token, [(chunk, root, geometry, codec) for chunk in chunks], jobs, dask)
    tokens = list(progress(hashes, len(chunks), "reading images", "shard"))
    expected = {"name": name, "schema": schema.to_dict(), "patch_size": settings.patch_size, "codec": settings.codec}
    if whole := finished_dataset(out, expected | {"mpp": geometry.mpp}, tokens, splits):
        return whole
    begin(out)
    done = {number: r for number, r in finished_shards(out).items() if number < len(tokens)}
    done = {number: record for number, record in done.items() if record.token == tokens[number]}
    todo = [number for number in range(len(chunks)) if number not in done]
    work = dispatch(_write, [(out, n, chunks[n], root, geometry, codec, tokens[n]) for n in todo], jobs, dask)
    rejected = {number: list(record.notes["rejected"]) for number, record in done.items()}
    written = set(done)
    for number, (record, bad) in zip(todo, progress(work, len(todo), f"writing {name}", "shard"), strict=True):
        rejected[number] = bad
        if record is not None:
            written.add(number)
    bad = [entry for number in sorted(rejected) for entry in rejected[number]]
    report_rejected(bad, len(rows), settings, out)
    source = dict(provenance or {}) | {"rejected": {"count": len(bad), "images": bad}}
    # A patient whose every image was rejected is in no split.
    bad_rows, all_rows = Counter(entry["image"] for entry in bad), Counter(row["path"] for row in rows)
    left = {row["patient"] for row in rows if bad_rows[row["path"]] < all_rows[row["path"]]}
    gone = {row["patient"] for row in rows} - left
    splits = {
        split: ({p: part for p, part in parts.items() if p not in gone}, recipe)
        for split, (parts, recipe) in (splits or {}).items()
    }
    return finish_dataset(
        out, name, schema, settings.patch_size, geometry.mpp, settings.codec, source, splits, shards=written
    )


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
        edge = min(height, width)
        if _too_small(edge, self.patch_size):
            raise UserError(f"{smaller_than(self.patch_size)}: {width} × {height} px")
        side = self.patch_size * self.mpp / source_mpp
        if self.patch_size > side * (1 + TOLERANCE):
            raise UserError(f"would have to be enlarged from {source_mpp:g} to {self.mpp:g} µm per pixel")
        if side > edge * (1 + TOLERANCE):
            covered, wanted = edge * source_mpp, self.patch_size * self.mpp
            raise UserError(f"covers {covered:.4g} µm, and a patch {wanted:.4g} µm: {width} × {height} px")
        if not self.cut:
            if height != width:
                raise UserError(f"is not square: {width} × {height} px")
            if side < edge * (1 - TOLERANCE):
                raise UserError(
                    f"has {edge * source_mpp / self.patch_size:.4g} µm per stored pixel, not {self.mpp:.4g}"
                )
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


def _too_small(edge: int, patch_size: int) -> bool:
    return patch_size > edge * (1 + TOLERANCE)


def _listed(settings: ImportSettings) -> tuple[pd.DataFrame, ImportSettings]:
    """A table of the images below a folder, its columns read from their paths by the pattern.

    Raises:
        UserError: There is no image, the pattern is none, or some paths do not match it.
    """
    folder = Path(settings.folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    try:
        pattern = re.compile(settings.pattern)
    except re.error as error:
        raise UserError(f"The pattern {settings.pattern!r} is no regular expression: {error}.") from None
    if not {"patient"} <= set(pattern.groupindex):
        raise UserError(
            f"The pattern {settings.pattern!r} names no patient.",
            r"Name parts of the path, such as '(?P<class>[^/]+)/(?P<patient>[^/_]+)_[0-9]+\.png'.",
        )
    paths = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_ENDINGS]
    matches = [pattern.fullmatch(path) for path in paths]
    if others := [path for path, match in zip(paths, matches, strict=True) if match is None]:
        raise UserError(
            f"{len(others)} of {len(paths)} images do not match {settings.pattern!r}, such as {others[:3]}.",
            "Widen the pattern; nothing is left out silently.",
        )
    if not paths:
        raise UserError(f"{folder} holds no image ({', '.join(IMAGE_ENDINGS)}).")
    rows = [{"image": path} | match.groupdict(default="") for path, match in zip(paths, matches, strict=True) if match]
    root = settings.root or str(folder)
    return pd.DataFrame(rows), dataclasses.replace(settings, image_column="image", patient_column="patient", root=root)


def _rows(table: pd.DataFrame, settings: ImportSettings) -> list[dict[str, Any]]:
    """What each patch will be made from: path, key, patient, slide, position, source resolution, fields and extras."""
    fields = [*([settings.class_field] if settings.class_field else []), *settings.categorical, *settings.continuous]
    optional = [settings.slide_column, settings.key_column, settings.x_column, settings.y_column]
    optional += [settings.source_mpp_column, settings.split_column]
    named = [settings.image_column, settings.patient_column, *fields, *settings.extra, *(c for c in optional if c)]
    told = settings_of_columns(settings, *_COLUMN_SETTINGS)
    require_columns(table, named, f"The table {settings.table}".strip(), told)
    for column in (*fields, *settings.extra):
        check_column(column)
    if not settings.source_mpp_column and not (math.isfinite(settings.source_mpp) and settings.source_mpp > 0):
        raise UserError(
            "The resolution of the images is not given.",
            "Set source_mpp (µm per pixel) or source_mpp_column; if only a nominal value is known, say so somewhere.",
        )
    rows: list[dict[str, Any]] = []
    seen: dict[str, tuple[int, str]] = {}
    for number, row in enumerate(table.astype(str).to_dict(orient="records"), start=1):
        path = row[settings.image_column]
        key = row[settings.key_column] if settings.key_column else _key(path)
        check_key(key)
        if key in seen:
            first, other = seen[key]
            raise UserError(
                f"Rows {first} and {number} of the table, not counting its header, would both have the key {key!r}: "
                f"{other!r} and {path!r}.",
                f"Make the column {settings.key_column!r} unique, or remove one of the rows."
                if settings.key_column
                else "Name a column of unique keys with key_column=…, or remove one of the rows.",
            )
        seen[key] = number, path
        patient = row[settings.patient_column]
        if is_missing(patient):
            raise UserError(
                f"{path!r} has no patient.", "Without patients no honest split is possible; fill the column."
            )
        resolution = row[settings.source_mpp_column] if settings.source_mpp_column else settings.source_mpp
        rows.append(
            {
                "path": path, "key": key, "patient": patient,
                "slide": row[settings.slide_column] if settings.slide_column else patient,
                "x": _whole(row, settings.x_column), "y": _whole(row, settings.y_column),
                "source_mpp": _positive(resolution, path),
                "fields": {name: row[name] for name in fields}, "extra": {name: row[name] for name in settings.extra},
            }
        )  # fmt: skip
    if not rows:
        raise UserError("The table of images has no row.")
    return rows


def _given_split(table: pd.DataFrame, settings: ImportSettings) -> tuple[dict[str, str], dict[str, Any]]:
    """The part of each patient in the split that the table brings, and a recipe.

    Raises:
        UserError: A patient is in two parts, or in one with some of its images only.
    """
    column = settings.split_column
    index = pd.DataFrame({"patient": table[settings.patient_column], column: table[column]}).astype(str)
    assert_patient_disjoint(index, column)
    pairs = index.drop_duplicates()
    if (half := pairs["patient"].duplicated()).any():
        raise UserError(
            f"{column}: patient {pairs.loc[half, 'patient'].iloc[0]!r} has images in a part and images in none.",
            "Fill the cells, or leave those images out of the table: a split is of whole patients.",
        )
    parts = {patient: part for patient, part in pairs.itertuples(index=False, name=None) if part}
    names = sorted(set(parts.values()))
    if not {"train", "test"} & set(names):
        logger.warning("The parts of column %s are %s; verbs look for train and test", column, names or "empty")
    # With the parts themselves, so that a rerun sees that they have changed.
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return parts, {"kind": "column of the table", "column": column, "parts_sha256": digest}


def _key(path: str) -> str:
    stem = Path(path.replace("\\", "/")).with_suffix("").as_posix()
    return "/".join(part for part in stem.replace(".", "-").split("/") if part.strip("-"))


def _whole(row: Mapping[str, str], column: str) -> int:
    if not column:
        return -1
    try:
        return int(row[column])
    except ValueError:
        raise UserError(f"Column {column!r} holds {row[column]!r}; it is a position in whole pixels.") from None


def _positive(value: str | float, path: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise UserError(f"{path!r} has the resolution {value!r}; it is a number of µm per pixel > 0 and never assumed.")
    return number


def _whole_mpp(rows: list[dict[str, Any]], root: Path, settings: ImportSettings) -> float:
    """µm per stored pixel when images are stored whole: that of the first one that is large enough.

    Raises:
        UserError: There is none; before any image is read, since nothing would come of it.
    """
    small: list[tuple[int, int]] = []
    for row in rows:
        try:
            with Image.open(root / row["path"]) as image:
                if not _too_small(min(image.size), settings.patch_size):
                    return min(image.size) * row["source_mpp"] / settings.patch_size
                small.append(image.size)
        except (OSError, Image.DecompressionBombError):
            continue
    if small:
        (width, height), least = small[0], min(min(size) for size in small)
        raise UserError(
            f"{len(small)} of {len(rows)} images are smaller than {settings.patch_size} px (the first is {width} × "
            f"{height} px); none is large enough.",
            f"Set patch_size={_fitting(least)}; images are never enlarged.",
        )
    raise UserError(f"None of the {len(rows)} images can be read, such as {root / rows[0]['path']}.", "Check root.")


def _fitting(edge: int) -> int:
    """The patch size for images of that edge: autoencoders halve it three times."""
    return edge // 8 * 8 or edge


def _token(rows: list[dict[str, Any]], root: Path, geometry: _Geometry, codec: str) -> str:
    """SHA-256 over everything that decides a shard's bytes."""
    digest = hashlib.sha256(json.dumps([rows, dataclasses.asdict(geometry), codec], sort_keys=True).encode())
    for row in rows:
        try:
            digest.update(hashlib.sha256((root / row["path"]).read_bytes()).digest())
        except OSError as error:
            digest.update(type(error).__name__.encode())
    return digest.hexdigest()


def _write(
    out: Path, number: int, rows: list[dict[str, Any]], root: Path, geometry: _Geometry, codec: str, token: str
) -> tuple[ShardRecord | None, list[dict[str, str]]]:
    """One shard; ``None`` if all of its images are bad, and the bad ones with the reason."""
    patches, bad = [], []
    for row in rows:
        try:
            cut = geometry.apply(decode_image((root / row["path"]).read_bytes()), row["source_mpp"])
        except UserError as error:
            bad.append({"image": row["path"], "reason": error.message})
        except OSError as error:
            bad.append({"image": row["path"], "reason": error.strerror or str(error)})
        else:
            known = {name: value for name, value in row.items() if name not in ("path", "key", "x", "y")}
            for x, y, image in cut:
                # A place in the slide is known only if the image's is; a tile's key tells its place in the image.
                key = f"{row['key']}/{x}_{y}" if geometry.tile else row["key"]
                placed = row["x"] >= 0 and row["y"] >= 0
                left, top = (row["x"] + x, row["y"] + y) if placed else (-1, -1)
                patches.append(Patch(key=key, image=image, x=left, y=top, **known))
    if not patches:
        return None, bad
    record = write_shard(out, number, patches, codec, token, notes={"rejected": bad})
    return dataclasses.replace(record, rows=pd.DataFrame()), bad
