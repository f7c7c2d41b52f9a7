"""The images of a table or a folder, and what each patch will be made from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.metadata.field_names import check_new_names
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.metadata.tables import require_columns, settings_of_columns
from latent_medi.metadata.tcga import warn_of_contradictions
from latent_medi.shards.importing.find_files import find_files, without_copies
from latent_medi.shards.importing.rejected import Rejected
from latent_medi.shards.importing.resolution import check_mpp
from latent_medi.shards.settings import ImportSettings, field_columns
from latent_medi.shards.writing.patch import check_key, check_length

logger = get_logger(__name__)

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""Endings of the files that a folder is searched for."""
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_LARGEST_TILE = "/99999_99999"
_OPTIONAL = ("slide_column", "key_column", "x_column", "y_column", "source_mpp_column", "split_column")
_UNKNOWN_PATIENTS = "If patients are not known, patient_is=image takes each image for one."
_REQUIRED = ("image_column", "patient_column", "class_field", "categorical", "continuous", "extra")


def list_images(settings: ImportSettings) -> tuple[pd.DataFrame, ImportSettings, list[Rejected]]:
    """A table of the images below a folder, with the columns that the pattern reads from their paths.

    Returns:
        The table, the settings that go with it, and what was found but cannot be used, such as links to nothing.

    Raises:
        UserError: There is no image, the pattern is none, or some paths do not match it.
    """
    folder = Path(settings.folder)
    try:
        pattern = re.compile(settings.pattern or ".*")
    except re.error as error:
        raise UserError(f"The pattern {settings.pattern!r} is no regular expression: {error}.") from None
    if "patient" not in pattern.groupindex and settings.patient_is != "image":
        hint = r"Name parts of the path, such as '(?P<class>[^/]+)/(?P<patient>[^/_]+)_[0-9]+\.png'."
        raise UserError(f"The pattern {settings.pattern!r} names no patient.", f"{hint} {_UNKNOWN_PATIENTS}")
    found = find_files(folder, IMAGE_ENDINGS)
    left_out = [
        Rejected(path.relative_to(folder).as_posix(), f"cannot be used: {why}", "Repair or remove it.")
        for path, why in found.left_out
    ]
    files = without_copies(found.files, folder)
    matches = {path: pattern.fullmatch(path) for path in (p.relative_to(folder).as_posix() for p in files)}
    if others := [path for path, match in matches.items() if match is None]:
        problem = f"{len(others)} of {len(matches)} images do not match {settings.pattern!r}, such as {others[:3]}."
        raise UserError(problem, "Widen the pattern; nothing is left out silently.")
    if not matches:
        why = f"; {left_out[0].image} {left_out[0].reason}" if left_out else ""
        raise UserError(f"{folder} holds no image ({', '.join(IMAGE_ENDINGS)}){why}.")
    rows = [{"image": path} | match.groupdict(default="") for path, match in matches.items() if match]
    root = settings.root or str(folder)
    changed = dataclasses.replace(settings, image_column="image", patient_column="patient", root=root)
    return pd.DataFrame(rows), changed, left_out


def images_as_patients(table: pd.DataFrame, settings: ImportSettings) -> tuple[pd.DataFrame, ImportSettings]:
    """The table with each image's key as its patient, and the settings that go with it.

    Raises:
        UserError: The table has patients.
    """
    if settings.patient_column in table:
        raise UserError(
            f"patient_is=image, and the table has a column {settings.patient_column!r}.",
            "Leave patient_is out, so that splits are by patient; or rename the column, if it holds something else.",
        )
    where = f"The table {settings.table}".strip()
    named = settings.key_column or settings.image_column
    require_columns(table, [named], where, settings_of_columns(settings, "image_column", "key_column"))
    keys = table[named].astype(str)
    patients = keys if settings.key_column else keys.map(key_of)
    return table.assign(patient=patients), dataclasses.replace(settings, patient_column="patient")


def columns_taken(settings: ImportSettings) -> list[str]:
    """The columns of a table that the settings name."""
    optional = [column for name in _OPTIONAL if (column := getattr(settings, name))]
    return [settings.image_column, settings.patient_column, *field_columns(settings), *settings.extra, *optional]


def image_rows(table: pd.DataFrame, settings: ImportSettings) -> tuple[list[dict[str, Any]], list[int], list[Rejected]]:
    """What each patch will be made from: path, key, patient, slide, position, source resolution, fields and extras.

    Returns:
        A mapping per usable row; their positions in the table; and the rows whose image's name or key cannot be used.

    Raises:
        UserError: A column is absent, a field has a name that is taken, two rows have one key, a row has no patient or
            resolution, or no row is usable.
    """
    fields, named = field_columns(settings), columns_taken(settings)
    where = f"The table {settings.table}".strip()
    require_columns(table, named, where, settings_of_columns(settings, *_REQUIRED, *_OPTIONAL))
    check_new_names(fields, settings.extra, settings.continuous)
    check_resolutions(settings)
    if not len(table):
        raise UserError(f"{where} has no row.", "It needs a row per image below its line of column names.")
    warn_of_contradictions(table[settings.patient_column], table, fields, where)
    rows: list[dict[str, Any]] = []
    kept: list[int] = []
    left_out: list[Rejected] = []
    seen: dict[str, tuple[int, str]] = {}
    for number, row in enumerate(table.astype(str).to_dict(orient="records"), start=1):
        path = row[settings.image_column]
        key = row[settings.key_column] if settings.key_column else key_of(path)
        if problem := _unusable(path, key, number, settings):
            left_out.append(problem)
            continue
        if key in seen:
            raise _same_key(key, (*seen[key], number, path), settings.key_column)
        seen[key] = number, path
        patient = row[settings.patient_column]
        if is_missing(patient):
            raise UserError(f"{path!r} has no patient.", f"Fill the column: splits are by patient. {_UNKNOWN_PATIENTS}")
        made_from = {"path": path, "key": key, "patient": patient}
        made_from["slide"] = row[settings.slide_column] if settings.slide_column else patient
        place = {"x": _whole(row, settings.x_column), "y": _whole(row, settings.y_column)}
        known = {"fields": {name: row[name] for name in fields}, "extra": {name: row[name] for name in settings.extra}}
        rows.append({**made_from, **place, "source_mpp": _resolution(row, path, settings), **known})
        kept.append(number - 1)
    if not rows:
        first = left_out[0]
        none = f"{where}: none of its {len(left_out)} images can be used; {first.image} {first.reason}."
        raise UserError(none, first.remedy)
    return rows, kept, left_out


def _same_key(key: str, rows: tuple[int, str, int, str], column: str) -> UserError:
    hint = f"Make the column {column!r} unique" if column else "Name a column of unique keys with key_column=…"
    return UserError(
        f"Rows {rows[0]} and {rows[2]} of the table, not counting its header, would both have the key {key!r}: "
        f"{rows[1]!r} and {rows[3]!r}.",
        f"{hint}, or remove one of the rows.",
    )


def check_resolutions(settings: ImportSettings) -> None:
    """Refuse settings whose resolutions are absent or in another unit than µm per pixel.

    Raises:
        UserError: They are.
    """
    if not settings.source_mpp_column:
        if not settings.source_mpp > 0:
            hint = "Set source_mpp (µm per pixel), or source_mpp_column. If it is only nominal, document that."
            raise UserError("The resolution of the images is not given.", hint)
        check_mpp(settings.source_mpp, "The resolution of the images, source_mpp,")
    if settings.mpp:
        check_mpp(settings.mpp, "The resolution of the patches, mpp,")


def _unusable(path: str, key: str, number: int, settings: ImportSettings) -> Rejected | None:
    """Why a row's image cannot be searched for, or stored."""
    if is_missing(path):
        return Rejected(f"row {number}", "names no image", f"Fill the column {settings.image_column!r}.")
    if _CONTROL.search(path):
        return Rejected(repr(path), "has a path with control characters", "Rename the file.")
    try:
        check_key(key)
        check_length(key + _LARGEST_TILE if settings.tile else key)
    except UserError as error:
        remedy = "Rename the file, or name a column of short, unique keys with key_column=…."
        return Rejected(path, f"has no usable key: {error.message}", remedy)
    return None


def given_split(table: pd.DataFrame, settings: ImportSettings) -> tuple[dict[str, str], dict[str, Any]]:
    """The part of each patient in the split that the table has, and its recipe.

    Raises:
        UserError: A patient is in two parts, or in one with some of its images only.
    """
    column = settings.split_column
    index = pd.DataFrame({"patient": table[settings.patient_column], column: table[column]}).astype(str)
    assert_patient_disjoint(index, column)
    pairs = index.drop_duplicates()
    if (half := pairs["patient"].duplicated()).any():
        patient = pairs.loc[half, "patient"].iloc[0]
        raise UserError(
            f"{column}: patient {patient!r} has images in a part and images in none.",
            "Fill the cells, or remove those images from the table: a split is of whole patients.",
        )
    parts = {patient: part for patient, part in pairs.itertuples(index=False, name=None) if part}
    names = sorted(set(parts.values()))
    if not {"train", "test"} & set(names):
        logger.warning("The parts of column %s are %s; verbs look for train and test", column, names or "empty")
    # With the parts themselves, so that a rerun sees that they have changed.
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return parts, {"kind": "column of the table", "column": column, "parts_sha256": digest}


def key_of(path: str) -> str:
    """The key that an image's path gives: without its ending, dots as dashes, no blank or empty part; maybe empty."""
    folder, _, name = path.replace("\\", "/").rpartition("/")
    stem = name if name.rfind(".") < 1 else name[: name.rfind(".")]
    parts = [part.strip() for part in f"{folder}/{stem}".replace(".", "-").split("/")]
    return "/".join(part for part in parts if part.strip("-"))


def _whole(row: Mapping[str, str], column: str) -> int:
    if not column:
        return -1
    try:
        return int(row[column])
    except ValueError:
        raise UserError(f"Column {column!r} holds {row[column]!r}; it is a position in whole pixels.") from None


def _resolution(row: Mapping[str, str], path: str, settings: ImportSettings) -> float:
    if not settings.source_mpp_column:
        return settings.source_mpp
    text = row[settings.source_mpp_column]
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not number > 0:
        problem = f"{path!r} has the resolution {text!r}; it is a number of µm per pixel > 0 and never assumed."
        raise UserError(problem, "Fill the column, with a point for a decimal comma.")
    check_mpp(number, f"The resolution of {path!r}, in column {settings.source_mpp_column!r},")
    return number
