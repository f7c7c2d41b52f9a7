"""Names and types of what ``dataset.json`` and the index hold, and the check of both when they are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latent_medi.core.errors import UserError
from latent_medi.core.json_types import check_types
from latent_medi.metadata.schema import Schema
from latent_medi.shards.format.codec import CODECS, ORIGINS

SCHEMA_VERSION = 1
FIXED_COLUMNS = ("key", "shard", "offset", "size", "origin", "patient", "slide", "x", "y", "source_mpp")
SUM_COLUMNS = ("image_crc32", "json_crc32")
"""CRC-32 of the bytes of the image and of the JSON member; datasets of earlier versions have none."""
SPLIT_PREFIX = "split_"
FINGERPRINT = "image_fingerprint"
"""Column that finds copies of a real patch; "" for a synthetic one."""
PICTURE = "shared_picture"
"""Column with a number for each picture that several patients share, -1 for every other patch."""
PATIENT = "patient"
PATIENT_IS = (PATIENT, "slide", "image", "group")
"""What the column of patients can hold. Where patients are not known, something else stands for them."""
KNOWN_COLUMNS = ("origin", "patient", "slide", "x", "y", "source_mpp")
"""What a patch has besides its fields."""
ROW_COLUMNS = ("key", "offset", "size", *SUM_COLUMNS, *KNOWN_COLUMNS, FINGERPRINT)
"""Columns that the index copies from the records of shards."""

# A dot would end the key early in WebDataset; the others break paths, globs or terminals.
BAD_KEY = r"[.\\\x00-\x1f\x7f]|^/|/$|//|^$|^\s|\s$"

_SHARD_FILE = re.compile(r"data/[^/\\\x00-\x1f]+\.tar")
_MOST_PIXELS = 65_535  # of an edge: JPEG's own limit

# Patterns of check_types
_ANY: dict[Any, Any] = {}
_SEEN = {"complete": bool, "parts": [{"fields": [str], "rows": [list], "patients?": str}]}
_COUNTS: dict[Any, Any] = {...: int}
_DUPLICATES: dict[Any, Any] = {
    **dict.fromkeys(("pictures", "patches", "patients", "same_pixels", "several_classes", "within_patients"), int),
    "by_class": _COUNTS,
    "examples": [{"patches": [str], "patients": [str]}],
}
_INFO: dict[Any, Any] = {
    "name": str,
    "schema": {"fields": [{"name": str, "kind": str}]},
    "patch_size": int,
    "mpp": float,
    "codec": str,
    "patient_is?": str,
    "counts": {"patches": int, ...: int},
    "shards": [{"file": str, "sha256": str, "count": int, "bytes": int, "made_from": str}],
    "splits": {...: {"recipe": _ANY, "counts": {...: _COUNTS}, "sha256": str}},
    "selections?": {...: {"recipe": _ANY, "result": _ANY, "columns": {...: {"sha256": str}}}},
    "duplicates?": _DUPLICATES,
    "provenance": {"seen?": _SEEN},
    "index_sha256?": str,
}


def check_info(info: Mapping[str, Any], where: str, remedy: str) -> Schema:
    """The schema of a ``dataset.json``, after all its entries have been checked.

    Args:
        info: Its content.
        where: The file, for messages.
        remedy: What to do if an entry is wrong.

    Raises:
        UserError: An entry is absent, of another type or out of range, or names a file outside the folder.
    """
    version = info.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UserError(f"{where} has dataset version {version!r}; this program reads version {SCHEMA_VERSION}.")
    check_types(info, _INFO, where, remedy)
    try:
        json.dumps(info, allow_nan=False)
    except ValueError:
        raise UserError(f"{where} is damaged: it holds NaN or Infinity, which are no JSON.", remedy) from None
    sound = {"patch_size": 1 <= info["patch_size"] <= _MOST_PIXELS, "mpp": info["mpp"] > 0}
    sound["codec"] = info["codec"] in CODECS
    if "patient_is" in info:
        sound["patient_is"] = info["patient_is"] in PATIENT_IS
    for name in (name for name, right in sound.items() if not right):
        raise UserError(f"{where} is damaged: {name} is {info[name]!r}.", remedy)
    check_shard_names([shard["file"] for shard in info["shards"]], where)
    try:
        return Schema.from_dict(info["schema"])
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.hint or remedy) from None


def check_shard_names(names: list[Any], where: str) -> None:
    """Refuse shards outside the folder's ``data``.

    Raises:
        UserError: Names the first.
    """
    if bad := [name for name in names if not isinstance(name, str) or not _SHARD_FILE.fullmatch(name)]:
        raise UserError(f"{where} names the shard {bad[0]!r}; every shard is in data/.")


def check_index(table: pa.Table, info: Mapping[str, Any], schema: Schema, where: str, remedy: str) -> None:
    """Check the columns of an index: none missing, the right types, no value missing, nothing outside the folder.

    Args:
        table: The index.
        info: What :func:`check_info` has checked.
        schema: The fields.
        where: The file, for messages.
        remedy: What to do if a column is wrong.

    Raises:
        UserError: Names the column and how many of its rows.
    """

    def refuse(problem: str) -> None:
        raise UserError(f"{where} is damaged: {problem}.", remedy)

    splits = [SPLIT_PREFIX + name for name in info["splits"]]
    selected = [column for entry in info.get("selections", {}).values() for column in entry["columns"]]
    text = {"key", "shard", "origin", "patient", "slide", *splits, *(f.name for f in schema.fields if not f.continuous)}
    whole = {"offset", "size", "x", "y", *(set(SUM_COLUMNS) & set(table.column_names))}
    if "duplicates" in info:
        text.add(FINGERPRINT)
        whole.add(PICTURE)
    numbers = {"source_mpp", *(f.name for f in schema.fields if f.continuous)}
    if len(set(table.column_names)) != table.num_columns:
        refuse("it has several columns of one name")
    if gone := sorted({*text, *whole, *numbers, *selected} - set(table.column_names)):
        raise UserError(f"{where} lacks the columns {gone}.", remedy)
    types = pa.types
    kinds: dict[str, tuple[Any, tuple[Callable[[pa.DataType], bool], ...]]] = {
        "text": (text, (types.is_string, types.is_large_string, types.is_string_view)),
        "whole numbers": (whole, (types.is_integer,)),
        "numbers": (numbers, (types.is_floating, types.is_integer)),
        "true or false, or numbers": (selected, (types.is_boolean, types.is_floating)),
    }
    for kind, (names, fits) in kinds.items():
        for name in sorted(names):
            column = table.column(name)
            if not any(fit(column.type) for fit in fits):
                refuse(f"the column {name!r} holds {column.type}, not {kind}")
            if column.null_count and not types.is_floating(column.type):  # NaN and null are unknown numbers
                refuse(f"{column.null_count} of {len(column)} rows have no value in {name!r}")
    if table.num_rows != info["counts"]["patches"]:
        refuse(f"it has {table.num_rows} patches, dataset.json {info['counts']['patches']}")
    check_shard_names(pc.unique(table.column("shard")).to_pylist(), where)
    keys = table.column("key")
    wrong = pc.match_substring_regex(keys, BAD_KEY)
    if pc.any(wrong).as_py():
        refuse(f"{keys.filter(wrong)[0].as_py()!r} cannot be the key of a patch")
    if other := sorted(set(pc.unique(table.column("origin")).to_pylist()) - set(ORIGINS)):
        refuse(f"an origin is {other[0]!r}, not {' or '.join(ORIGINS)}")
    most = max((shard["bytes"] for shard in info["shards"]), default=0)
    for name in ("offset", "size"):
        bounds = pc.min_max(table.column(name)).as_py()
        if table.num_rows and not 0 <= bounds["min"] <= bounds["max"] <= most:
            refuse(f"{name!r} runs from {bounds['min']} to {bounds['max']}, in shards of at most {most} bytes")
