"""The end of writing a dataset folder: its shards' records become the index, and ``dataset.json`` is written last."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.files import remove, temporaries
from latent_medi.core.progress import get_logger
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.shards.checking.duplicates import check_pictures, duplicates_text, find_duplicates
from latent_medi.shards.checking.verify import picture_problems
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.folder import NEXT_INDEX, write_folder
from latent_medi.shards.format.layout import FINGERPRINT, PATIENT, SPLIT_PREFIX
from latent_medi.shards.format.software import WRITTEN_WITH
from latent_medi.shards.writing.records import PROGRESS_FOLDER, ShardRecord, finished_shards, shard_file
from latent_medi.shards.writing.rewrite import dataset_or_none, remembered_splits

logger = get_logger(__name__)

Splits = Mapping[str, tuple[Mapping[str, str], Mapping[str, Any]]]
"""By the split's name: its part by patient, and the recipe that made it. Other patients are in no part (``""``)."""


@dataclass(frozen=True)
class Description:
    """The entries of ``dataset.json`` that are known before the shards.

    Args:
        name: The dataset's name.
        schema: Its fields; every value in the shards must be in it.
        patch_size: Edge of a patch in pixels.
        mpp: µm per pixel of the stored patches.
        codec: ``png``, ``jpg`` or ``webp``.
        provenance: JSON-able: where the patches come from. No times or host names: equal input gives equal bytes.
        splits: Its named splits.
        patient_is: What its column of patients holds, one of :data:`~latent_medi.shards.format.layout.PATIENT_IS`.
    """

    name: str
    schema: Schema
    patch_size: int
    mpp: float
    codec: str = "png"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    splits: Splits = field(default_factory=dict)
    patient_is: str = PATIENT

    def info(self) -> dict[str, Any]:
        """The entries without the splits, as ``dataset.json`` holds them."""
        known = {"name": self.name, "schema": self.schema.to_dict(), "patch_size": self.patch_size}
        known |= {"patient_is": self.patient_is} if self.patient_is != PATIENT else {}
        return known | {"mpp": float(self.mpp), "codec": self.codec, "provenance": _as_json(self.provenance)}


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(dict(value), allow_nan=False))


def finish_dataset(folder: str | Path, about: Description, shards: Iterable[int] | None = None) -> PatchDataset:
    """Merge the shards' records into ``index.parquet``, write ``dataset.json``, and remove what writing left behind.

    Splits of a dataset that was in the folder before are recorded again, by patient.

    Args:
        folder: The dataset folder.
        about: What the dataset is.
        shards: Numbers of the shards that make the dataset; others are removed. By default all, without a gap.

    Raises:
        UserError: A shard is missing, shards disagree (size, codec, columns, keys), a value is not in the schema, or a
            split has unknown patients, a patient or a picture in two parts.
    """
    folder = Path(folder)
    if not (math.isfinite(about.mpp) and about.mpp > 0):
        raise UserError(f"mpp is {about.mpp} µm per pixel; it is a number > 0.")
    records = _records(folder, about, shards)
    listed = [
        {"file": shard_file(r.number), "sha256": r.sha256, "count": r.count, "bytes": r.size, "made_from": r.token}
        | {name: text for name, text in r.notes.items() if name == WRITTEN_WITH}
        for r in records
    ]
    info = about.info() | {"shards": listed, "splits": {}}
    dataset = PatchDataset(folder, info, about.schema, _index(records, about.schema))
    find_duplicates(dataset)
    if text := duplicates_text(dataset.info.get("duplicates", {})):
        logger.warning("%s: %s", folder, text)
    _add_splits(dataset, about.splits)
    write_folder(folder, dataset.info, dataset.index)
    _clear(folder, {shard_file(record.number) for record in records})
    return PatchDataset.open(folder)


def _records(folder: Path, about: Description, shards: Iterable[int] | None) -> list[ShardRecord]:
    """The records of the shards that make a dataset, in order."""
    found = finished_shards(folder)
    wanted = sorted(shards) if shards is not None else list(range(max(found, default=-1) + 1))
    if not wanted:
        raise UserError(f"{folder} has no finished shard.", "Write shards first.")
    if gone := [number for number in wanted if number not in found]:
        missing = f"{len(gone)} of {len(wanted)} shards: {gone[:10]}"
        raise UserError(f"{folder} lacks {missing}.", "Run the step that writes it again.")
    for record in (found[number] for number in wanted):
        for what in ("codec", "patch_size"):
            if (theirs := getattr(record, what)) != (ours := getattr(about, what)):
                problem = f"{shard_file(record.number)} has {what.replace('_', ' ')} {theirs}, not {ours}."
                raise UserError(problem, "Write all shards with the same settings.")
    return [found[number] for number in wanted]


def _add_splits(dataset: PatchDataset, given: Splits) -> None:
    """Add columns and recipes of the given splits, and of those that the folder had before."""
    patients = set(dataset.index["patient"])
    splits, left_out = dict(given), dict[str, set[tuple[str, str]]]()
    for name, entry in remembered_splits(dataset.folder).items():
        if name not in given:
            left_out[name] = {
                (patient, slide) for patient, slide in entry.get("left_out", ())
            }  # earlier versions: none
            splits[name] = ({p: part for p, part in entry["parts"].items() if p in patients}, entry["recipe"])
            if new := len(patients - set(splits[name][0])):
                logger.warning("%d new patients are in no part of the split %r: make it again", new, name)
    for name, (parts, recipe) in splits.items():
        if unknown := sorted(set(parts) - patients):
            raise UserError(f"The split {name!r} names patients that the dataset lacks: {unknown[:5]}.")
        slides = zip(dataset.index["patient"], dataset.index["slide"], strict=True)
        out = left_out.get(name, set())
        dataset.index[SPLIT_PREFIX + name] = ["" if slide in out else parts.get(slide[0], "") for slide in slides]
        try:
            check_pictures(dataset.index, dataset.index[SPLIT_PREFIX + name], name, recipe)
        except UserError as error:
            if name in given:
                raise
            # The images are written; the split can be made again.
            logger.warning("%s %s", error.message, error.hint)
        dataset.info["splits"][name] = {"recipe": dict(recipe)}


def _clear(folder: Path, keep: set[str]) -> None:
    """Remove what an interrupted or earlier run left: temporary files, other shards and the records."""
    shards = [path for path in folder.glob("data/part-*.tar") if path.relative_to(folder).as_posix() not in keep]
    for leftover in (*temporaries(folder / "data"), *temporaries(folder), *shards, folder / NEXT_INDEX):
        remove(leftover)
    remove(folder / PROGRESS_FOLDER)


def _index(records: Sequence[ShardRecord], schema: Schema) -> pd.DataFrame:
    """The index of some shards, in order; continuous fields become numbers, every value is looked up in the schema."""
    index = pd.concat([r.rows for r in records], ignore_index=True)
    prints = index.pop(FINGERPRINT).fillna("") if FINGERPRINT in index else None  # earlier versions kept none
    index.insert(1, "shard", np.repeat([shard_file(r.number) for r in records], [r.count for r in records]))
    if index["key"].duplicated().any():
        key = index.loc[index["key"].duplicated(), "key"].iloc[0]
        raise UserError(f"Two patches have the key {key!r}, in {sorted(set(index.loc[index['key'] == key, 'shard']))}.")
    fields = pd.DataFrame([json.loads(text) for text in index.pop("fields")], index=index.index)
    extras = [json.loads(text) for text in index.pop("extra")]
    extra = pd.DataFrame(extras, index=index.index)
    for frame, what in ((fields, "field"), (extra, "extra column")):
        for column in frame.columns[frame.isna().any()]:
            problem = f"The {what} {column!r} is in some shards but not in all."
            raise UserError(problem, "Write all shards with the same columns.")
    for column in extra.columns:
        if len(types := {type(row[column]).__name__ for row in extras}) > 1:
            raise UserError(f"The extra column {column!r} is of several types: {sorted(types)}.")
    if set(fields.columns) != set(schema.names):
        raise UserError(f"The patches have the fields {sorted(fields.columns)}, the schema {sorted(schema.names)}.")
    schema.encode(fields)  # every value must have a code
    for known in schema.fields:
        values = fields[known.name]
        if known.continuous:
            values = np.array([np.nan if v == UNKNOWN_WORD else float(v) for v in values], dtype=np.float64)
        index[known.name] = values
    for column in sorted(extra.columns):
        index[column] = extra[column]
    if prints is not None and (index["origin"] == "real").any():
        index[FINGERPRINT] = prints
    return index


def finished_dataset(
    folder: Path, about: Description, tokens: Sequence[str], same_provenance: bool = False
) -> PatchDataset | None:
    """The dataset in ``folder`` if it is finished, undamaged and made from the same things; else ``None``.

    Args:
        folder: A dataset folder, or none yet.
        about: What it has to be. Its splits have to be recorded with the same recipes; other splits do not matter.
        tokens: What each shard is made from, in order.
        same_provenance: Whether its provenance has to be the same, too.
    """
    dataset = dataset_or_none(folder)
    if dataset is None:
        return None
    wanted = about.info() | {"made_from": list(tokens)}
    found = dataset.info | {"made_from": [shard["made_from"] for shard in dataset.info["shards"]]}
    if not same_provenance:
        del wanted["provenance"]
    same = all(found.get(name) == value for name, value in wanted.items())
    for name, (_, recipe) in about.splits.items():
        same = same and dataset.info["splits"].get(name, {}).get("recipe") == _as_json(recipe)
    if not same or set(dataset.verify()) - set(picture_problems(dataset)):
        return None
    _clear(folder, {shard["file"] for shard in dataset.info["shards"]})
    return dataset
