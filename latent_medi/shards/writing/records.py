"""A record of each finished shard, kept until its dataset is finished: an interrupted run continues after the last."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from latent_medi.core.files import atomic_path, cannot_write, refuse_foreign, remove, sha256_bytes, sha256_file
from latent_medi.core.progress import get_logger
from latent_medi.shards.format.folder import INDEX_FILE, INFO_FILE
from latent_medi.shards.format.layout import SUM_COLUMNS
from latent_medi.shards.format.software import WRITTEN_WITH, other_software
from latent_medi.shards.format.tar import with_sums

logger = get_logger(__name__)

PROGRESS_FOLDER = ".progress"

_SUM = "content_sha256"
_IN_SUMMARY = ("sha256", "size", "codec", "patch_size", "token", "notes")


@dataclass(frozen=True)
class ShardRecord:
    """What is known of one finished shard.

    Args:
        number: Its number.
        sha256: Of the tar.
        count: Number of patches.
        size: Bytes of the tar.
        codec: ``png``, ``jpg`` or ``webp``.
        patch_size: Edge in pixels.
        token: What the shard was made from, as its writer put it; a rerun compares it.
        notes: JSON-able remarks of its writer.
        rows: A row per patch: key, offset and size of the image member, the CRC-32 of both members, origin, patient,
            slide, x, y, source_mpp, and ``fields`` and ``extra`` as JSON objects.
    """

    number: int
    sha256: str
    count: int
    size: int
    codec: str
    patch_size: int
    token: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)
    rows: pd.DataFrame = field(default_factory=pd.DataFrame, compare=False, repr=False)


def mark_unfinished(folder: Path) -> None:
    """Make a dataset folder an unfinished one, to be written (again): without its index, with a folder for records.

    Raises:
        UserError: It holds files of another kind that would be replaced.
    """
    start_records(folder)
    remove(folder / INFO_FILE)
    remove(folder / INDEX_FILE)


def start_records(folder: Path) -> None:
    """Make the folder for records, before the first shard; raises as :func:`mark_unfinished`."""
    if (folder / PROGRESS_FOLDER).is_dir():
        return
    refuse_foreign_files(folder)
    try:
        (folder / PROGRESS_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None


def refuse_foreign_files(folder: Path) -> None:
    """Refuse a folder that is no dataset, with files that a dataset would replace."""
    signs = {INFO_FILE: "schema_version", PROGRESS_FOLDER: ""}
    refuse_foreign(folder, signs, [INFO_FILE, INDEX_FILE, "data/part-*.tar"])


def shard_file(number: int) -> str:
    """Path of a shard inside the dataset folder."""
    return f"data/part-{number:06d}.tar"


def shard_number(file: str) -> int:
    """The number in the path of a shard or of its record."""
    return int(Path(file).stem.removeprefix("part-"))


def _record_path(folder: Path, number: int) -> Path:
    return folder / PROGRESS_FOLDER / f"part-{number:06d}.parquet"


def _sum(summary: Mapping[str, Any], rows: pd.DataFrame) -> str:
    content = [summary, {column: rows[column].tolist() for column in rows.columns}]
    return sha256_bytes(json.dumps(content, sort_keys=True).encode())


def write_record(folder: Path, record: ShardRecord) -> None:
    """Write a record, atomically, with a checksum of its content."""
    summary = {name: getattr(record, name) for name in _IN_SUMMARY} | {"notes": dict(record.notes)}
    summary[_SUM] = _sum(summary, record.rows)
    table = pa.Table.from_pandas(record.rows, preserve_index=False)
    table = table.replace_schema_metadata({"shard": json.dumps(summary)})
    with atomic_path(_record_path(folder, record.number)) as temporary:
        pq.write_table(table, temporary)


def remove_record(folder: Path, number: int) -> None:
    """Remove a shard's record; its tar stays."""
    _record_path(folder, number).unlink(missing_ok=True)


def _read_record(path: Path) -> ShardRecord:
    if not path.is_file():
        raise OSError("it is not a file")
    table = pq.read_table(path)
    summary = json.loads(table.schema.metadata[b"shard"])
    rows = table.replace_schema_metadata(None).to_pandas()
    checksum = summary.pop(_SUM, None)  # earlier versions wrote none
    if checksum is not None and checksum != _sum(summary, rows):
        raise ValueError("its content is not what was written")
    return ShardRecord(shard_number(path.name), count=len(rows), rows=rows, **summary)


def finished_shards(folder: str | Path) -> dict[int, ShardRecord]:
    """The shards of an unfinished dataset folder whose tar has the recorded SHA-256; others are logged and left out."""
    folder = Path(folder)
    found: dict[int, ShardRecord] = {}
    for path in sorted((folder / PROGRESS_FOLDER).glob("part-*.parquet")):
        try:
            record = _read_record(path)
        except (OSError, pa.ArrowException, KeyError, ValueError, TypeError) as error:
            logger.warning("%s is not readable (%s): its shard will be written again", path, error)
            continue
        tar = folder / shard_file(record.number)
        if not tar.is_file() or tar.stat().st_size != record.size or sha256_file(tar) != record.sha256:
            change = other_software(str(record.notes.get(WRITTEN_WITH, "")), record.codec)
            logger.warning("%s is missing or damaged: it will be written again. %s", tar, change)
            continue
        if not set(SUM_COLUMNS) <= set(record.rows.columns):  # cut by an earlier version
            record = replace(record, rows=with_sums(tar, record.rows))
        found[record.number] = record
    return found


def kept_shards(folder: Path, tokens: Sequence[str]) -> dict[int, ShardRecord]:
    """The finished shards that a rerun keeps: shard ``n`` if it was made from ``tokens[n]``."""
    found = finished_shards(folder).items()
    return {n: record for n, record in found if n < len(tokens) and record.token == tokens[n]}
