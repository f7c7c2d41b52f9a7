"""Whether a dataset folder still is what its files say."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from latent_medi.errors import UserError
from latent_medi.files import sha256_file
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.shards.selections import column_hash

if TYPE_CHECKING:
    from latent_medi.shards.dataset import PatchDataset

INFO_FILE = "dataset.json"
SPLIT_PREFIX = "split_"


def check_split(index: pd.DataFrame, column: pd.Series, name: str) -> None:
    """Refuse a split that shares a patient, or that holds synthetic patches outside its training part.

    Raises:
        UserError: Names the split and the first such row.
    """
    assert_patient_disjoint(index, SPLIT_PREFIX + name)
    wrong = index[(index["origin"] == "synthetic") & (column != "") & ~column.str.startswith("train")]
    if len(wrong):
        raise UserError(
            f"Split {name!r}: {len(wrong)} synthetic patches are outside its training part, "
            f"first {wrong['key'].iloc[0]!r} in {column[wrong.index[0]]!r}.",
            "Only real patients validate, test and serve as reference.",
        )


def problems_of(dataset: PatchDataset, images: bool = False) -> list[str]:
    """Everything wrong with the folder, in words; empty if all is well.

    Args:
        dataset: The dataset.
        images: Also decode every patch.
    """
    problems: list[str] = []
    listed = {shard["file"] for shard in dataset.info["shards"]}
    if set(dataset.index["shard"]) - listed:
        problems.append(
            f"the index names shards that {INFO_FILE} lacks: {sorted(set(dataset.index['shard']) - listed)}"
        )
    of_shard = dict(list(dataset.index.groupby("shard", sort=False)))
    for shard in dataset.info["shards"]:
        path, file = dataset.folder / shard["file"], shard["file"]
        mine = of_shard.get(file, dataset.index.iloc[:0])
        if len(mine) != shard["count"]:
            problems.append(f"{file}: the index has {len(mine)} patches, {INFO_FILE} {shard['count']}")
        if not path.is_file():
            problems.append(f"{file} is missing")
        elif sha256_file(path) != shard["sha256"]:
            problems.append(f"{file} is damaged: its SHA-256 is not the recorded one")
        else:
            problems += _misplaced(path, file, mine, dataset.info["codec"])
    extra = {f"data/{p.name}" for p in (dataset.folder / "data").glob("*") if not p.name.startswith(".")} - listed
    problems += [f"{file} is not part of the dataset" for file in sorted(extra)]
    if dataset.index["key"].duplicated().any():
        problems.append(f"the key {dataset.index['key'][dataset.index['key'].duplicated()].iloc[0]!r} occurs twice")
    problems += _attempt(lambda: dataset.schema.encode(dataset.index))
    for name, recorded in dataset.info["splits"].items():
        column = dataset.index[SPLIT_PREFIX + name]
        problems += _attempt(lambda column=column, name=name: check_split(dataset.index, column, name))
        if recorded["sha256"] != column_hash(column):
            problems.append(f"the column of split {name!r} is not the recorded one")
    for name, recorded in dataset.selections.items():
        for label, entry in recorded["columns"].items():
            if entry["sha256"] != column_hash(dataset.index[label]):
                problems.append(f"the column {label!r} of selection {name!r} is not the recorded one")
    if images:
        for row in range(len(dataset)):
            problems += _attempt(lambda row=row: dataset.read([row]))
    return problems


def _attempt(check: Any) -> list[str]:
    try:
        check()
    except UserError as error:
        return [error.message]
    return []


def _misplaced(path: Path, file: str, index: pd.DataFrame, codec: str) -> list[str]:
    """Rows whose image is not where the index says."""
    with tarfile.open(path) as tar:
        members = {member.name: (member.offset_data, member.size) for member in tar}
    return [
        f"{file}: {key!r} is not where the index says"
        for key, offset, size in zip(index["key"], index["offset"], index["size"], strict=True)
        if members.get(f"{key}.{codec}") != (offset, size) or f"{key}.json" not in members
    ]
