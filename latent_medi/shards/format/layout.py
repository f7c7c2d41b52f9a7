"""What may stand in ``dataset.json`` and in the columns of the index: whatever wrote them, a mistyped entry is one
message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import Schema
from latent_medi.shards.format.codec import CODECS, ORIGINS

SCHEMA_VERSION = 1
FIXED_COLUMNS = ("key", "shard", "offset", "size", "origin", "patient", "slide", "x", "y", "source_mpp")
SUM_COLUMNS = ("image_crc32", "json_crc32")
"""CRC-32 of the bytes of the image and of the JSON member; datasets of earlier versions have none."""
SPLIT_PREFIX = "split_"
FINGERPRINT = "image_fingerprint"
"""What is kept of a real patch to find its copies; "" for a synthetic one."""
PICTURE = "shared_picture"
"""A number for each picture that lies under several patients, -1 for every other patch."""
KNOWN_COLUMNS = ("origin", "patient", "slide", "x", "y", "source_mpp")
"""What a patch comes with beside its fields."""
ROW_COLUMNS = ("key", "offset", "size", *SUM_COLUMNS, *KNOWN_COLUMNS, FINGERPRINT)
"""Columns of a shard's record that the index takes over."""

# A dot would end the key early in WebDataset; the others break paths, globs or terminals.
BAD_KEY = r"[.\\\x00-\x1f\x7f]|^/|/$|//|^$|^\s|\s$"

_SHARD_FILE = re.compile(r"data/[^/\\\x00-\x1f]+\.tar")
_MOST = 2**63
_MOST_PIXELS = 65_535  # of an edge: JPEG's own limit

# A dictionary is an object with at least these entries ("name?" may be absent); under ... stands what all other entries
# are. A list with one shape is a list of such.
_ANY: dict[Any, Any] = {}
_SEEN = {"complete": bool, "parts": [{"fields": [str], "rows": [list], "patients?": str}]}
_INFO: dict[Any, Any] = {
    "name": str,
    "schema": {"fields": [{"name": str, "kind": str}]},
    "patch_size": int,
    "mpp": float,
    "codec": str,
    "counts": {"patches": int, ...: int},
    "shards": [{"file": str, "sha256": str, "count": int, "bytes": int, "made_from": str}],
    "splits": {...: {"recipe": _ANY, "counts": {...: {...: int}}, "sha256": str}},
    "selections?": {...: {"recipe": _ANY, "result": _ANY, "columns": {...: {"sha256": str}}}},
    "duplicates?": {"pictures": int, "patches": int, "patients": int, "same_pixels": int, "several_classes": int,
                    "by_class": {...: int}, "within_patients": int,
                    "examples": [{"patches": [str], "patients": [str]}]},
    "provenance": {"seen?": _SEEN},
    "index_sha256?": str,
}  # fmt: skip
_WORDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number", float: "a number",
          bool: "true or false", type(None): "null"}  # fmt: skip


def _misfit(value: Any, shape: Any, path: str) -> str:
    """The first entry that has not its shape, in words; empty if all have."""
    kind = shape if isinstance(shape, type) else type(shape)
    fits = isinstance(value, (int, float) if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        return f"{path} is {_WORDS[type(value)]}, not {_WORDS[kind]}"
    if kind in (int, float) and not abs(value) < _MOST:
        return f"{path} is out of range"
    inside: list[tuple[str, Any, Any]] = []
    if isinstance(shape, list):
        inside = [(f"{path}[{i}]", entry, shape[0]) for i, entry in enumerate(value)]
    elif isinstance(shape, dict):
        named = {str(key).removesuffix("?"): key for key in shape if key is not ...}
        for name, key in named.items():
            if name in value:
                inside.append((f"{path}.{name}".lstrip("."), value[name], shape[key]))
            elif not key.endswith("?"):
                return f"{path}.{name}".lstrip(".") + " is absent"
        if ... in shape:
            inside += [(f"{path}.{key}".lstrip("."), v, shape[...]) for key, v in value.items() if key not in named]
    return next((found for where, entry, inner in inside if (found := _misfit(entry, inner, where))), "")


def check_info(info: Mapping[str, Any], where: str, remedy: str) -> Schema:
    """The schema of a ``dataset.json``, all of whose entries have been looked at.

    Args:
        info: Its content.
        where: The file, for messages.
        remedy: What to do if it is not as it should be.

    Raises:
        UserError: An entry is absent, of another type or out of range, or names a file outside the folder.
    """
    if info.get("schema_version") != SCHEMA_VERSION or isinstance(info["schema_version"], bool):
        version = info.get("schema_version")
        raise UserError(f"{where} has dataset version {version!r}; this program reads version {SCHEMA_VERSION}.")
    problem = _misfit(info, _INFO, "")
    if not problem and not 1 <= info["patch_size"] <= _MOST_PIXELS:
        problem = f"patch_size is {info['patch_size']}"
    if not problem and not info["mpp"] > 0:
        problem = f"mpp is {info['mpp']}"
    if not problem and info["codec"] not in CODECS:
        problem = f"codec is {info['codec']!r}, not {', '.join(CODECS[:-1])} or {CODECS[-1]}"
    if problem:
        raise UserError(f"{where} is not as it should be: {problem}.", remedy)
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
        raise UserError(f"{where} names the shard {bad[0]!r}; shards lie in data/ and nowhere else.")


def check_index(table: pa.Table, info: Mapping[str, Any], schema: Schema, where: str, remedy: str) -> None:
    """Look at the columns of an index: all there, of their types, no value missing, nothing outside the folder.

    Args:
        table: The index.
        info: What :func:`check_info` has looked at.
        schema: The fields.
        where: The file, for messages.
        remedy: What to do if it is not as it should be.

    Raises:
        UserError: Names the column and how many of its rows.
    """

    def refuse(problem: str) -> None:
        raise UserError(f"{where} is not as it should be: {problem}.", remedy)

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
    for names, fits, kind in (
        (text, _is_text, "text"),
        (whole, pa.types.is_integer, "whole numbers"),
        (numbers, lambda t: pa.types.is_floating(t) or pa.types.is_integer(t), "numbers"),
        (selected, lambda t: pa.types.is_boolean(t) or pa.types.is_floating(t), "true or false, or numbers"),
    ):
        for name in sorted(names):
            column = table.column(name)
            if not fits(column.type):
                refuse(f"the column {name!r} holds {column.type}, not {kind}")
            if column.null_count and not pa.types.is_floating(column.type):  # an unknown number is not there
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


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
