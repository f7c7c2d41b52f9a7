"""Damage of a dataset folder: every file compared with its checksums, and checksums for a folder without them."""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.progress import progress
from latent_medi.metadata.fields import is_missing
from latent_medi.shards.checking.duplicates import check_pictures, find_duplicates
from latent_medi.shards.format.folder import INFO_FILE, check_split, write_folder
from latent_medi.shards.format.layout import FINGERPRINT, PICTURE, SPLIT_PREFIX, SUM_COLUMNS
from latent_medi.shards.format.selections import SELECTED_PREFIX, column_hash
from latent_medi.shards.format.tar import json_member, sample_at, with_sums

if TYPE_CHECKING:
    from latent_medi.shards.dataset import PatchDataset

# Columns that only the index has, like splits and selections.
_NOT_IN_MEMBERS = ("shard", "offset", "size", *SUM_COLUMNS, FINGERPRINT, PICTURE)


def problems_of(dataset: PatchDataset, images: bool = False) -> list[str]:
    """Every problem of the folder, in words.

    Args:
        dataset: The dataset.
        images: Also decode every patch.
    """
    problems: list[str] = []
    listed = {shard["file"] for shard in dataset.info["shards"]}
    if unknown := sorted(set(dataset.index["shard"]) - listed):
        problems.append(f"the index names shards that {INFO_FILE} lacks: {unknown}")
    counts = [shard["count"] for shard in dataset.info["shards"]]
    for shard in progress(dataset.info["shards"], desc=f"checking {dataset.name}", unit="patches", each=counts):
        path, file = dataset.folder / shard["file"], shard["file"]
        mine = dataset.index.iloc[dataset.rows_of_shard.get(file, [])]
        if len(mine) != shard["count"]:
            problems.append(f"{file}: the index has {len(mine)} patches, {INFO_FILE} {shard['count']}")
        if not path.is_file():
            problems.append(f"{file} is {'not a file' if path.exists() else 'missing'}")
        else:
            problems += _of_shard(dataset, path, shard, mine)
    extra = {f"data/{p.name}" for p in (dataset.folder / "data").glob("*") if not p.name.startswith(".")} - listed
    problems += [f"{file} is not part of the dataset" for file in sorted(extra)]
    keys = dataset.index["key"]
    problems += [f"the key {key!r} occurs twice" for key in keys[keys.duplicated()].head(1)]
    problems += _attempt(dataset.schema.encode, dataset.index)
    for name, recorded in dataset.info["splits"].items():
        column = dataset.index[SPLIT_PREFIX + name]
        problems += _attempt(check_split, dataset.index, column, name)
        if recorded["sha256"] != column_hash(column):
            problems.append(f"the column of split {name!r} is not the recorded one")
    for name, recorded in dataset.selections.items():
        for label, entry in recorded["columns"].items():
            if entry["sha256"] != column_hash(dataset.index[label]):
                problems.append(f"the column {label!r} of selection {name!r} is not the recorded one")
    problems += picture_problems(dataset)
    if images:
        for row in range(len(dataset)):
            problems += _attempt(dataset.read, [row])
    return problems


def picture_problems(dataset: PatchDataset) -> list[str]:
    """Splits that have one picture in several parts without allowing it, in words.

    A dataset without the column of shared pictures has no such problem.
    """
    recipes = {name: recorded["recipe"] for name, recorded in dataset.info["splits"].items()}
    columns = {name: dataset.index[SPLIT_PREFIX + name] for name in recipes}
    return [p for name in recipes for p in _attempt(check_pictures, dataset.index, columns[name], name, recipes[name])]


def _attempt(check: Callable[..., Any], *arguments: Any) -> list[str]:
    try:
        check(*arguments)
    except UserError as error:
        return [error.message]
    return []


def _of_shard(dataset: PatchDataset, path: Path, shard: dict[str, Any], index: pd.DataFrame) -> list[str]:
    """Problems of one shard: changed bytes, images at other offsets, JSON members that differ from the index."""
    file = shard["file"]
    try:
        with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if hashlib.sha256(data).hexdigest() != shard["sha256"]:
                return [f"{file} is damaged: its SHA-256 is not the recorded one"]
            return _misplaced(data, file, index, dataset.info["codec"]) or _differing(dataset, data, file, index)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        return [f"{file} cannot be read: {error}"]


def _misplaced(data: mmap.mmap, file: str, index: pd.DataFrame, codec: str) -> list[str]:
    """Rows whose image is not at its offset, or is not followed by its JSON member."""
    problems = []
    for key, offset, size in zip(*(index[c].tolist() for c in ("key", "offset", "size")), strict=True):
        try:
            sample_at(data, key, codec, offset, size)
        except ValueError:
            problems.append(f"{file}: {key!r} is not where the index says")
    return problems


def _differing(dataset: PatchDataset, data: mmap.mmap, file: str, index: pd.DataFrame) -> list[str]:
    """Columns of the index that differ from the JSON members, with the number of patches and the first."""
    continuous = [known.name for known in dataset.schema.fields if known.continuous]
    ours = [c for c in index.columns if not c.startswith((SPLIT_PREFIX, SELECTED_PREFIX)) and c not in _NOT_IN_MEMBERS]
    rows = [dict(zip(ours, row, strict=True)) for row in zip(*(index[c].tolist() for c in ours), strict=True)]
    sums = index[SUM_COLUMNS[1]].tolist() if SUM_COLUMNS[1] in index else [None] * len(rows)
    differ: dict[str, list[str]] = {}
    for row, checksum, offset, size in zip(rows, sums, index["offset"].tolist(), index["size"].tolist(), strict=True):
        _, start, length = json_member(data, offset, size)
        text = data[start : start + length]
        if checksum is not None and zlib.crc32(text) != checksum:
            differ.setdefault(SUM_COLUMNS[1], []).append(f"{row['key']!r}")
        member = json.loads(text)
        if not isinstance(member, dict):
            raise ValueError(f"the JSON member of {row['key']!r} is no object")
        for name in continuous:
            row[name], member[name] = _number(row[name]), _number(member.get(name))
        if member != row:
            for name in sorted({*member, *row}):
                if (there := member.get(name)) != (here := row.get(name)):
                    differ.setdefault(name, []).append(f"{row['key']!r}: {here!r} in the index, {there!r} in the shard")
    return [
        f"{file}: {name!r} of {len(found)} patches is not what their JSON members say, first {found[0]}"
        for name, found in differ.items()
    ]


def _number(value: Any) -> float | None:
    """A continuous value; ``None`` where it is unknown."""
    return None if value is None or is_missing(value) else float(value)


def seal(dataset: PatchDataset) -> None:
    """Write the checksums and duplicates that a folder of an earlier version lacks, computed from its shards.

    Args:
        dataset: A dataset in which :func:`problems_of` finds none.
    """
    parts = [with_sums(dataset.folder / file, dataset.index.iloc[rows]) for file, rows in dataset.rows_of_shard.items()]
    dataset.index = pd.concat(parts).sort_index()
    find_duplicates(dataset)
    dataset.info = write_folder(dataset.folder, dataset.info, dataset.index)
