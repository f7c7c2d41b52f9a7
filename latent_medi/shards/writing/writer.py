"""Patches into a dataset folder: a reproducible tar and a record per shard, then the index and ``dataset.json``."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path
from latent_medi.core.locks import output_lock
from latent_medi.core.progress import progress
from latent_medi.metadata.schema import Schema
from latent_medi.shards.checking.likeness import fingerprint
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import check_codec, encode_image
from latent_medi.shards.format.folder import INFO_FILE
from latent_medi.shards.format.layout import FINGERPRINT, PATIENT, ROW_COLUMNS, SUM_COLUMNS
from latent_medi.shards.format.software import WRITTEN_WITH, written_with
from latent_medi.shards.format.tar import BLOCK, tar_end, tar_member
from latent_medi.shards.writing.finish import Description, Splits, finish_dataset, finished_dataset
from latent_medi.shards.writing.patch import Patch, checked_row, column_types
from latent_medi.shards.writing.records import (
    ShardRecord,
    kept_shards,
    shard_file,
    start_records,
    write_record,
)
from latent_medi.shards.writing.rewrite import prepare_rewrite

__all__ = ["Patch", "write_dataset", "write_shard"]


def write_shard(
    folder: str | Path,
    number: int,
    patches: Iterable[Patch],
    codec: str = "png",
    token: str = "",
    notes: Mapping[str, Any] | None = None,
    resizer: str = "",
) -> ShardRecord:
    """Write ``data/part-NNNNNN.tar`` and its record, each whole or not at all; equal patches give equal bytes.

    Any number of processes may write different shards of one folder.

    Args:
        folder: The dataset folder.
        number: The shard's number, from 0.
        patches: At least one patch, all of one size, with the same fields and extra columns.
        codec: ``png``, ``jpg`` or ``webp``.
        token: What the shard is made from, for a rerun to compare with.
        notes: JSON-able remarks, read for the record after the last patch.
        resizer: The library that made the patches from larger ones, with its version; empty if there was none.

    Raises:
        UserError: A patch cannot be stored (named), there is no patch, or the folder is a finished dataset.
    """
    folder = Path(folder)
    check_codec(codec)
    if (folder / INFO_FILE).exists():
        raise UserError(f"{folder} is a finished dataset.", "Write to another folder, or remove this one first.")
    start_records(folder)
    rows: list[dict[str, Any]] = []
    digest, size, edge = hashlib.sha256(), 0, 0
    keys: set[str] = set()
    with atomic_path(folder / shard_file(number)) as temporary, open(temporary, "wb") as file:
        for patch in patches:
            row = checked_row(patch)
            height, width = patch.image.shape[:2]
            edge = edge or height
            if (height, width) != (edge, edge):
                raise UserError(f"Patch {patch.key!r} is {width}×{height}, not {edge}×{edge} like the first.")
            if patch.key in keys:
                raise UserError(f"Two patches have the key {patch.key!r}.")
            keys.add(patch.key)
            if rows and column_types(row) != column_types(rows[0]):
                first = rows[0]["key"]
                raise UserError(f"Patches {first!r} and {patch.key!r} differ in their fields or extra columns.")
            member = {k: v for k, v in row.items() if k not in ("fields", "extra")} | row["fields"] | row["extra"]
            image = encode_image(patch.image, codec, patch.origin)
            text = json.dumps(member, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
            row |= {"offset": size + BLOCK, "size": len(image), FINGERPRINT: ""}
            row |= dict(zip(SUM_COLUMNS, (zlib.crc32(image), zlib.crc32(text)), strict=True))
            if patch.origin == "real":
                row[FINGERPRINT] = fingerprint(patch.image)
            rows.append(row)
            for part in (*tar_member(f"{patch.key}.{codec}", image), *tar_member(f"{patch.key}.json", text)):
                file.write(part)
                digest.update(part)
                size += len(part)
        if not rows:
            raise UserError(f"Shard {number} of {folder} would be empty.", "Give at least one patch per shard.")
        end = tar_end(size)
        file.write(end)
        digest.update(end)
    remarks = {WRITTEN_WITH: written_with(codec, resizer), **(notes or {})}
    record = ShardRecord(
        number, digest.hexdigest(), len(rows), size + len(end), codec, edge, token, remarks, _frame(rows)
    )
    write_record(folder, record)
    return record


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame({name: [row[name] for row in rows] for name in ROW_COLUMNS})
    frame = frame.astype(dict.fromkeys(SUM_COLUMNS, np.uint32))
    for name in ("fields", "extra"):
        frame[name] = [json.dumps(row[name], ensure_ascii=False) for row in rows]
    return frame


def patches_token(patches: Sequence[Patch], codec: str) -> str:
    """SHA-256 over everything that some patches put into a shard."""
    digest = hashlib.sha256(codec.encode())
    for patch in patches:
        digest.update(json.dumps([checked_row(patch), patch.image.shape], sort_keys=True).encode())
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
    splits: Splits | None = None,
    patches_per_shard: int = 512,
    patient_is: str = PATIENT,
) -> PatchDataset:
    """Write a whole dataset folder. Given a sequence, a rerun keeps the shards made from the same patches.

    Args:
        folder: The dataset folder; another dataset in it is replaced.
        patches: The patches, in order.
        name, schema, patch_size, mpp, codec, provenance, splits: As for
            :class:`~latent_medi.shards.writing.finish.Description`.
        patches_per_shard: Patches per tar, > 0.
        patient_is: What the patches' patients are, as for the same.

    Raises:
        UserError: As for :func:`write_shard` and :func:`~latent_medi.shards.writing.finish.finish_dataset`.
    """
    if patches_per_shard < 1:
        raise UserError(f"patches_per_shard is {patches_per_shard}; it is at least 1.")
    about = Description(name, schema, patch_size, mpp, codec, provenance or {}, splits or {}, patient_is)
    with output_lock(folder):
        return _write_dataset(Path(folder), patches, about, patches_per_shard)


def _write_dataset(folder: Path, patches: Iterable[Patch], about: Description, per_shard: int) -> PatchDataset:
    tokens: list[str] = []
    if isinstance(patches, Sequence):
        tokens = [patches_token(chunk, about.codec) for chunk in _chunks(patches, per_shard)]
        if whole := finished_dataset(folder, about, tokens, same_provenance=True):
            return whole
    prepare_rewrite(folder, about.splits)
    kept = kept_shards(folder, tokens) if tokens else {}
    count = 0
    total = len(patches) if isinstance(patches, Sequence) else None
    for chunk in progress(_chunks(patches, per_shard), total, f"writing {about.name}", "patches", per_shard):
        if count not in kept:
            write_shard(folder, count, chunk, about.codec, tokens[count] if tokens else "")
        count += 1
    return finish_dataset(folder, about, range(count))


def _chunks(patches: Iterable[Patch], size: int) -> Iterator[list[Patch]]:
    rest = iter(patches)
    while chunk := list(islice(rest, size)):
        yield chunk
