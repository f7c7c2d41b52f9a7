"""Patches into a dataset folder: reproducible tars first, each with a resume record, then the index and
``dataset.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, remove, temporaries
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger, progress
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.shards.checking.duplicates import check_pictures, duplicates_text, find_duplicates
from latent_medi.shards.checking.likeness import fingerprint
from latent_medi.shards.checking.verify import picture_problems
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import check_codec, check_image, encode_image
from latent_medi.shards.format.folder import INFO_FILE, NEXT_INDEX, write_folder
from latent_medi.shards.format.layout import FINGERPRINT, ROW_COLUMNS, SPLIT_PREFIX, SUM_COLUMNS
from latent_medi.shards.format.tar import BLOCK, tar_end, tar_member
from latent_medi.shards.writing.patch import Patch, column_types, describe
from latent_medi.shards.writing.records import (
    PROGRESS_FOLDER,
    ShardRecord,
    begin,
    claim,
    finished_shards,
    shard_file,
    write_record,
)
from latent_medi.shards.writing.rewrite import opened_or_none, remembered_splits

__all__ = ["Patch", "ShardRecord", "finish_dataset", "finished_shards", "shard_file", "write_dataset", "write_shard"]

logger = get_logger(__name__)


def write_shard(
    folder: str | Path,
    number: int,
    patches: Iterable[Patch],
    codec: str = "png",
    token: str = "",
    notes: Mapping[str, Any] | None = None,
) -> ShardRecord:
    """Write ``data/part-NNNNNN.tar`` and its resume record, each whole or not at all. The same patches give the same
    bytes.

    Any number of processes may write different shards of one folder.

    Args:
        folder: The dataset folder.
        number: The shard's number, from 0.
        patches: At least one patch, of one size, with the same fields and extra columns.
        codec: ``png``, ``jpg`` or ``webp``.
        token: What the shard is made from, for a rerun to compare with.
        notes: JSON-able remarks, kept in the record as they are once the last patch was taken.

    Raises:
        UserError: A patch that cannot be stored (named), no patch at all, or a folder that already is a finished
            dataset.
    """
    folder = Path(folder)
    check_codec(codec)
    if (folder / INFO_FILE).exists():
        raise UserError(f"{folder} is a finished dataset.", "Write to another folder, or remove this one first.")
    claim(folder)
    rows: list[dict[str, Any]] = []
    digest, written, patch_size = hashlib.sha256(), 0, 0
    seen: set[str] = set()
    with atomic_path(folder / shard_file(number)) as temporary, open(temporary, "wb") as file:
        for patch in patches:
            row = describe(patch)
            check_image(patch.image)
            height, width = patch.image.shape[:2]
            patch_size = patch_size or height
            if (height, width) != (patch_size, patch_size):
                raise UserError(
                    f"Patch {patch.key!r} is {width}×{height}, not {patch_size}×{patch_size} like the first."
                )
            if patch.key in seen:
                raise UserError(f"Two patches have the key {patch.key!r}.")
            seen.add(patch.key)
            if rows and (column_types(row) != column_types(rows[0])):
                raise UserError(
                    f"Patches {rows[0]['key']!r} and {patch.key!r} differ in their fields or extra columns."
                )
            member = {k: v for k, v in row.items() if k not in ("fields", "extra")} | row["fields"] | row["extra"]
            image = encode_image(patch.image, codec, patch.origin)
            parts = [*tar_member(f"{patch.key}.{codec}", image)]
            text = json.dumps(member, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
            parts += tar_member(f"{patch.key}.json", text)
            sums = {"image_crc32": zlib.crc32(image), "json_crc32": zlib.crc32(text)}
            found = {FINGERPRINT: fingerprint(patch.image) if patch.origin == "real" else ""}
            rows.append({**row, "offset": written + BLOCK, "size": len(image), **sums, **found})
            for part in parts:
                file.write(part)
                digest.update(part)
                written += len(part)
        if not rows:
            raise UserError(f"Shard {number} of {folder} would be empty.", "Give at least one patch per shard.")
        end = tar_end(written)
        file.write(end)
        digest.update(end)
    record = ShardRecord(
        number,
        digest.hexdigest(),
        len(rows),
        written + len(end),
        codec,
        patch_size,
        token,
        dict(notes or {}),
        _frame(rows),
    )
    write_record(folder, record)
    return record


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame({name: [row[name] for row in rows] for name in ROW_COLUMNS})
    frame = frame.astype(dict.fromkeys(SUM_COLUMNS, np.uint32))
    for name in ("fields", "extra"):
        frame[name] = [json.dumps(row[name], ensure_ascii=False) for row in rows]
    return frame


def finish_dataset(
    folder: str | Path,
    name: str,
    schema: Schema,
    patch_size: int,
    mpp: float,
    codec: str,
    provenance: Mapping[str, Any],
    splits: Mapping[str, tuple[Mapping[str, str], Mapping[str, Any]]] | None = None,
    shards: Iterable[int] | None = None,
) -> PatchDataset:
    """Merge the shards' records into ``index.parquet``, write ``dataset.json`` last, and clear what writing left
    behind.

    Args:
        folder: The dataset folder.
        name: The dataset's name.
        schema: Its fields; every value in the shards must be in it.
        patch_size: Edge of a patch in pixels.
        mpp: µm per pixel of the stored patches.
        codec: ``png``, ``jpg`` or ``webp``.
        provenance: JSON-able: where it came from; no times or host names, so that the same input gives the same bytes.
        splits: By name: (split name by patient, the recipe that made it). Patients not named are in no split (``""``).
        shards: The numbers that make the dataset; other shards are removed. By default all that are there, numbered
            without a gap.

    Raises:
        UserError: A shard is missing, or shards disagree (size, codec, columns, keys), or a value is not in the schema.
    """
    folder = Path(folder)
    if not (math.isfinite(mpp) and mpp > 0):
        raise UserError(f"mpp is {mpp} µm per pixel; it is a number > 0.")
    records = finished_shards(folder)
    wanted = sorted(shards) if shards is not None else list(range(max(records, default=-1) + 1))
    if not wanted:
        raise UserError(f"{folder} has no finished shard.", "Write shards first.")
    if gone := [number for number in wanted if number not in records]:
        raise UserError(
            f"{folder} lacks {len(gone)} of {len(wanted)} shards: {gone[:10]}.", "Run the step that writes it again."
        )
    kept = [records[number] for number in wanted]
    for record in kept:
        for what, theirs, ours in (("codec", record.codec, codec), ("patch size", record.patch_size, patch_size)):
            if theirs != ours:
                raise UserError(
                    f"{shard_file(record.number)} has {what} {theirs}, not {ours}.",
                    "Write all shards with the same settings.",
                )
    index = _index(kept, schema)
    provenance = json.loads(json.dumps(dict(provenance), allow_nan=False))
    listed = [
        {"file": shard_file(r.number), "sha256": r.sha256, "count": r.count, "bytes": r.size, "made_from": r.token}
        for r in kept
    ]
    info: dict[str, Any] = {
        "name": name, "schema": schema.to_dict(), "patch_size": patch_size, "mpp": float(mpp), "codec": codec,
        "shards": listed, "splits": {}, "provenance": provenance,
    }  # fmt: skip
    dataset = PatchDataset(folder, info, schema, index)
    find_duplicates(dataset)
    index, info = dataset.index, dataset.info
    if told := duplicates_text(info.get("duplicates", {})):
        logger.warning("%s: %s", folder, told)
    given = set(splits or {})
    splits = dict(splits or {})
    for split, entry in remembered_splits(folder).items():
        there = set(index["patient"])
        parts = {patient: part for patient, part in entry["parts"].items() if patient in there}
        if split not in splits:
            splits[split] = (parts, entry["recipe"])
            if new := len(there - set(parts)):
                logger.warning("%d new patients are in no part of the split %r: make it again", new, split)
    for split, (by_patient, recipe) in splits.items():
        if unknown := sorted(set(by_patient) - set(index["patient"])):
            raise UserError(f"The split {split!r} names patients that the dataset lacks: {unknown[:5]}.")
        index[SPLIT_PREFIX + split] = [by_patient.get(patient, "") for patient in index["patient"]]
        try:
            check_pictures(index, index[SPLIT_PREFIX + split], split, recipe)
        except UserError as error:
            if split in given:
                raise
            logger.warning("%s %s", error.message, error.hint)  # the images are there, and the split can be made again
        info["splits"][split] = {"recipe": dict(recipe)}
    write_folder(folder, info, index)
    _clear(folder, {shard_file(number) for number in wanted})
    return PatchDataset.open(folder)


def _clear(folder: Path, keep: set[str]) -> None:
    """Remove what an interrupted or earlier writing left: temporary files, other shards and the records."""
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
        if len(frame.columns) and frame.isna().any(axis=None):
            column = frame.columns[frame.isna().any()][0]
            raise UserError(
                f"The {what} {column!r} is in some shards but not in all.", "Write all shards with the same columns."
            )
    for column in extra.columns:
        if len(types := {type(row[column]).__name__ for row in extras}) > 1:
            raise UserError(f"The extra column {column!r} is of several types: {sorted(types)}.")
    if set(fields.columns) != set(schema.names):
        raise UserError(f"The patches have the fields {sorted(fields.columns)}, the schema {sorted(schema.names)}.")
    schema.encode(fields)  # every value must have a code
    for known in schema.fields:
        index[known.name] = (
            np.array([np.nan if v == UNKNOWN_WORD else float(v) for v in fields[known.name]], dtype=np.float64)
            if known.continuous
            else fields[known.name]
        )
    for column in sorted(extra.columns):
        index[column] = extra[column]
    if prints is not None and (index["origin"] == "real").any():
        index[FINGERPRINT] = prints
    return index


def patches_token(patches: Sequence[Patch], codec: str) -> str:
    """SHA-256 over everything that some patches put into a shard."""
    digest = hashlib.sha256(codec.encode())
    for patch in patches:
        row = describe(patch)
        check_image(patch.image)
        digest.update(json.dumps([row, patch.image.shape], sort_keys=True).encode())
        digest.update(np.ascontiguousarray(patch.image).data)
    return digest.hexdigest()


def write_dataset(
    folder: str | Path,
    patches: Iterable[Patch],
    name: str,
    schema: Schema,
    patch_size: int,
    mpp: float,
    codec: str = "png",
    provenance: Mapping[str, Any] | None = None,
    splits: Mapping[str, tuple[Mapping[str, str], Mapping[str, Any]]] | None = None,
    patches_per_shard: int = 512,
) -> PatchDataset:
    """Write a whole dataset folder. Given a sequence, shards that are already there from the same patches are kept.

    Args:
        folder: The dataset folder; what it holds of another dataset is replaced.
        patches: The patches, in order.
        name: As for :func:`finish_dataset`, like the arguments not listed here.
        schema: Fields.
        patch_size: Edge in pixels.
        mpp: µm per pixel of the stored patches.
        codec: ``png``, ``jpg`` or ``webp``.
        provenance: Where it came from.
        splits: Named splits by patient.
        patches_per_shard: Patches per tar, > 0.

    Raises:
        UserError: As for :func:`write_shard` and :func:`finish_dataset`.
    """
    if patches_per_shard < 1:
        raise UserError(f"patches_per_shard is {patches_per_shard}; it is at least 1.")
    folder = Path(folder)
    with output_lock(folder):
        return _write_dataset(
            folder, patches, name, schema, patch_size, mpp, codec, provenance, splits, patches_per_shard
        )


def _write_dataset(
    folder: Path, patches: Iterable[Patch], name: str, schema: Schema, patch_size: int, mpp: float, codec: str,
    provenance: Mapping[str, Any] | None, splits: Mapping[str, Any] | None, patches_per_shard: int,
) -> PatchDataset:  # fmt: skip
    provenance = json.loads(json.dumps(dict(provenance or {}), allow_nan=False))
    sequence = patches if isinstance(patches, Sequence) else None
    tokens: dict[int, str] = {}
    if sequence is not None:
        chunks = list(_chunks(sequence, patches_per_shard))
        tokens = {number: patches_token(chunk, codec) for number, chunk in enumerate(chunks)}
        expected = {
            "name": name,
            "schema": schema.to_dict(),
            "patch_size": patch_size,
            "mpp": float(mpp),
            "codec": codec,
        }
        if whole := finished_dataset(folder, expected | {"provenance": provenance}, list(tokens.values()), splits):
            return whole
    begin(folder)
    done = finished_shards(folder) if sequence is not None else {}
    count = 0
    for number, chunk in enumerate(
        progress(_chunks(patches, patches_per_shard), len(tokens) or None, f"writing {name}", "shard")
    ):
        count = number + 1
        token = tokens.get(number, "")
        if number not in done or done[number].token != token:
            write_shard(folder, number, chunk, codec, token)
    return finish_dataset(folder, name, schema, patch_size, mpp, codec, provenance, splits, shards=range(count))


def finished_dataset(
    folder: Path, expected: Mapping[str, Any], tokens: Sequence[str], splits: Mapping[str, Any] | None = None
) -> PatchDataset | None:
    """The dataset in ``folder`` if it is finished, undamaged and made from the same things; else ``None``.

    Args:
        folder: A dataset folder, or none yet.
        expected: Entries of ``dataset.json`` that have to be equal.
        tokens: What each shard is made from, in order.
        splits: Splits that have to be there with the same recipe; others are no difference.
    """
    dataset = opened_or_none(folder)
    if dataset is None:
        return None
    same = all(dataset.info.get(key) == value for key, value in expected.items())
    same = same and [shard["made_from"] for shard in dataset.info["shards"]] == list(tokens)
    for name, (_, recipe) in (splits or {}).items():
        same = same and dataset.info["splits"].get(name, {}).get("recipe") == json.loads(json.dumps(dict(recipe)))
    if not same or set(dataset.verify()) - set(picture_problems(dataset)):
        return None
    _clear(folder, {shard["file"] for shard in dataset.info["shards"]})
    return dataset


def _chunks(patches: Iterable[Patch], size: int) -> Iterable[list[Patch]]:
    chunk: list[Patch] = []
    for patch in patches:
        chunk.append(patch)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
