"""One patch with its metadata, and the checks that it passes before it is stored."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import UNKNOWN_WORD, is_missing
from latent_medi.shards.format.codec import ORIGINS, check_image
from latent_medi.shards.format.layout import BAD_KEY, FINGERPRINT, FIXED_COLUMNS, PICTURE, SPLIT_PREFIX, SUM_COLUMNS
from latent_medi.shards.format.selections import SELECTED_PREFIX
from latent_medi.shards.format.tar import tar_member


@dataclass(eq=False)
class Patch:
    """One patch and its metadata.

    Args:
        key: Unique name, no dot; may hold ``/``. WebDataset takes everything after the first dot for the file type.
        image: uint8 [H, W, 3], RGB, square.
        patient: The unit that never crosses splits.
        slide: The slide it was cut from; the patient's name where slides are not known.
        x: Left edge in level-0 pixels; -1 where it is not known.
        y: Top edge in level-0 pixels; -1 where it is not known.
        source_mpp: µm per pixel of the level 0 it was cut from.
        fields: A value for every field of the schema; ``"unknown"`` (or NaN) where the data have none.
        origin: ``real`` or ``synthetic``.
        extra: Further index columns, the same ones in every patch of a dataset.
    """

    key: str
    image: np.ndarray
    patient: str
    slide: str
    x: int
    y: int
    source_mpp: float
    fields: Mapping[str, str | float]
    origin: str = "real"
    extra: Mapping[str, str | int | float] = field(default_factory=dict)


_BAD_KEY = re.compile(BAD_KEY)
_SHORT = 20  # characters: so many fit a tar's header, whatever their bytes


def check_key(key: str) -> None:
    """Refuse a key that WebDataset would read differently.

    Raises:
        UserError: It has a dot, a backslash, a control character, blanks around it or an empty path part.
    """
    if not isinstance(key, str) or _BAD_KEY.search(key):
        raise UserError(
            f"The key {key!r} cannot name a patch.",
            "WebDataset takes what follows a dot for the file type: use '-'. "
            "Remove backslashes, control characters, blanks at an end and empty parts between slashes.",
        )


def check_length(key: str) -> None:
    """Refuse a patch's key that does not fit the header of a tar.

    Raises:
        UserError: It is too long.
    """
    if len(key) > _SHORT:
        tar_member(f"{key}.json", b"")


def _field_text(name: str, value: Any, key: str) -> str:
    """A field value as the string that the JSON member holds; ``repr`` of a float reads back exactly."""
    if value is None or isinstance(value, (list, dict, tuple, set)):
        hint = f"Give a string or a number, {UNKNOWN_WORD!r} if it is missing."
        raise UserError(f"Patch {key!r}: field {name!r} is {value!r}.", hint)
    if is_missing(value):
        return UNKNOWN_WORD
    return repr(float(value)) if isinstance(value, (float, np.floating)) else str(value)


def _extra_value(name: str, value: Any, key: str) -> str | int | float:
    """An extra column's value as a JSON-able scalar that is never null."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        if abs(int(value)) >= 2**63:
            problem = f"Patch {key!r}: the extra column {name!r} is {value}, too large for 64 bits."
            raise UserError(problem, "Use a string.")
        return int(value)
    if isinstance(value, (float, np.floating)) and math.isfinite(value):
        return float(value)
    raise UserError(f"Patch {key!r}: the extra column {name!r} is {value!r}; it holds a string or a finite number.")


def checked_row(patch: Patch) -> dict[str, Any]:
    """A patch's row of its shard's record, everything but the image.

    Raises:
        UserError: The patch cannot be stored.
    """
    check_key(patch.key)
    check_length(patch.key)
    check_image(patch.image)
    if patch.origin not in ORIGINS:
        raise UserError(f"Patch {patch.key!r}: the origin is {' or '.join(ORIGINS)}, not {patch.origin!r}.")
    for name, value in (("patient", patch.patient), ("slide", patch.slide)):
        if not isinstance(value, str) or is_missing(value):
            raise UserError(f"Patch {patch.key!r} has no {name}.", "Splits are by patient, so every patch needs one.")
    source_mpp = float(patch.source_mpp)
    if not (math.isfinite(source_mpp) and source_mpp > 0):
        raise UserError(f"Patch {patch.key!r}: source_mpp is {patch.source_mpp} µm per pixel; it is a number > 0.")
    fields = {name: _field_text(name, value, patch.key) for name, value in patch.fields.items()}
    extra = {name: _extra_value(name, value, patch.key) for name, value in patch.extra.items()}
    for name in (*fields, *extra):
        check_column(name)
    if both := set(fields) & set(extra):
        raise UserError(f"Patch {patch.key!r}: {sorted(both)} are both fields and extra columns.")
    known = {"key": patch.key, "origin": patch.origin, "patient": patch.patient, "slide": patch.slide}
    return known | {"x": int(patch.x), "y": int(patch.y), "source_mpp": source_mpp, "fields": fields, "extra": extra}


def column_types(row: Mapping[str, Any]) -> tuple[set[str], dict[str, type]]:
    """What must be the same in every patch: names of the fields, names and types of the extra columns."""
    return set(row["fields"]), {name: type(value) for name, value in row["extra"].items()}


def check_column(name: str) -> None:
    """Refuse a field or extra column whose name the index uses itself.

    Raises:
        UserError: It does.
    """
    used = (*FIXED_COLUMNS, *SUM_COLUMNS, FINGERPRINT, PICTURE)
    if name in used or name.startswith((SPLIT_PREFIX, SELECTED_PREFIX)):
        reserved = ", ".join((*used, f"{SPLIT_PREFIX}…", f"{SELECTED_PREFIX}…"))
        raise UserError(f"A field cannot be called {name!r}.", f"Rename the column; the index uses {reserved} itself.")
