"""The two files that make a folder a dataset: ``dataset.json``, what it is, and ``index.parquet``, a row per patch.

``dataset.json`` holds a checksum of its own content and the SHA-256 of the index; both are compared on every opening.
The two files change together: a writer stores the new index under a second name, then ``dataset.json``, which names the
index to read, and then renames the new index over the old one. An interruption at any point leaves the folder as it was
or as it was to become. Only writers rename: a reader takes the index that ``dataset.json`` names.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, read_sealed, remove, sha256_file, sync_folder, write_sealed
from latent_medi.core.progress import get_logger
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.shards.format import layout
from latent_medi.shards.format.layout import SPLIT_PREFIX, SUM_COLUMNS, check_index, check_info
from latent_medi.shards.format.selections import SELECTED_PREFIX, column_hash, recorded_selections

logger = get_logger(__name__)

INFO_FILE = "dataset.json"
INDEX_FILE = "index.parquet"
NEXT_INDEX = ".index-next.parquet"
INDEX_HASH = "index_sha256"
UNITS = {"patches": "key", "patients": "patient", "slides": "slide"}
REMEDY = "Restore it from a copy, or write the dataset again."

_ABOUT = ("name", "schema", "patch_size", "mpp", "codec", "patient_is")
_ORDER = (*_ABOUT, "counts", "shards", "splits", "selections", "duplicates")
_TRIES = 10
_warned: set[str] = set()


def read_folder(folder: Path, place: str = "") -> tuple[dict[str, Any], Schema, pd.DataFrame]:
    """The content of ``dataset.json``, the schema in it, and the index.

    A folder of an earlier version, without checksums, is read with one warning.

    Args:
        folder: A finished dataset folder.
        place: What messages call it; by default its path.

    Raises:
        UserError: A file is absent, damaged or of a newer version.
    """
    place = place or str(folder)
    for _ in range(_TRIES):  # a writer may exchange the files meanwhile
        info, sealed = read_sealed(folder / INFO_FILE, REMEDY)
        schema = check_info(info, f"{place}/{INFO_FILE}", REMEDY)
        if (INDEX_HASH in info) != sealed:
            raise UserError(f"{place}/{INFO_FILE} is damaged: its checksum or that of the index is missing.", REMEDY)
        data = _index_bytes(folder, info.get(INDEX_HASH))
        if data is not None:
            break
        if read_sealed(folder / INFO_FILE, REMEDY)[0] == info:
            path = folder / INDEX_FILE
            problem = f"is damaged: it is not the index that {INFO_FILE} names" if path.is_file() else "is not a file"
            raise UserError(f"{place}/{INDEX_FILE} {problem if path.exists() else 'is missing'}.", REMEDY)
    else:
        raise UserError(f"{place} keeps changing.", "Wait until the command that writes it has ended.")
    try:
        table = pq.read_table(pa.BufferReader(data))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{place}/{INDEX_FILE} cannot be read: {error}.", REMEDY) from None
    # A split or selection that dataset.json does not name does not exist: its writing was interrupted.
    known = {SPLIT_PREFIX + name for name in info["splits"]}
    known |= {column for entry in info.get("selections", {}).values() for column in entry["columns"]}
    marked = [c for c in table.column_names if c.startswith((SPLIT_PREFIX, SELECTED_PREFIX))]
    table = table.drop_columns([c for c in marked if c not in known])
    check_index(table, info, schema, f"{place}/{INDEX_FILE}", REMEDY)
    if not (sealed and set(SUM_COLUMNS) <= set(table.column_names)) and place not in _warned:
        _warned.add(place)
        text = "%s was written by an earlier version, without checksums: damage to it can pass unnoticed. "
        logger.warning(text + "`latent-medi shards verify %s seal=true` adds them.", place, place)
    return info, schema, table.to_pandas(ignore_metadata=True)


def _index_bytes(folder: Path, wanted: str | None) -> bytes | None:
    """The index with the hash that ``dataset.json`` names, or without a hash any index; ``None`` if there is none."""
    for name in (INDEX_FILE, NEXT_INDEX) if wanted else (INDEX_FILE,):
        path = folder / name
        if not path.is_file():  # opening a pipe would wait for somebody to write
            continue
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}.", REMEDY) from None
        if wanted is None or hashlib.sha256(data).hexdigest() == wanted:
            return data
    return None


def index_fits(folder: Path) -> bool:
    """Whether ``index.parquet`` has the hash that ``dataset.json`` names, if it names one."""
    wanted = read_sealed(folder / INFO_FILE, REMEDY)[0].get(INDEX_HASH)
    return wanted is None or sha256_file(folder / INDEX_FILE) == wanted


def check_split(index: pd.DataFrame, column: pd.Series, name: str) -> None:
    """Refuse a split with a patient in two parts, or with synthetic patches outside its training part.

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


def write_folder(folder: Path, info: Mapping[str, Any], index: pd.DataFrame) -> dict[str, Any]:
    """Check the splits of an index, then write it and ``dataset.json``: both or neither.

    Returns:
        ``info`` with the counts, the hash of the index, and each split's and selection's counts and column hashes
        filled in.

    Raises:
        UserError: A split shares a patient, or holds synthetic patches outside its training part.
    """
    splits: dict[str, Any] = {}
    for name, entry in info["splits"].items():
        column = index[SPLIT_PREFIX + name]
        check_split(index, column, name)
        counts = {
            str(value): {unit: int(rows[unit_column].nunique()) for unit, unit_column in UNITS.items()}
            for value, rows in sorted(index.groupby(column), key=lambda item: str(item[0]))
        }
        splits[name] = {"recipe": entry["recipe"], "counts": counts, "sha256": column_hash(column)}
    totals = {unit: int(index[column].nunique()) for unit, column in UNITS.items()}
    totals |= {"shards": len(info["shards"])} | {o: int((index["origin"] == o).sum()) for o in ("real", "synthetic")}
    complete = {**info, "counts": totals, "splits": splits, "selections": recorded_selections(info, index)}
    kept = [k for k in (*_ORDER, "provenance") if k in complete and (k != "selections" or complete[k])]
    complete = {"schema_version": layout.SCHEMA_VERSION} | {k: complete[k] for k in kept}
    layout.check_shard_names([shard["file"] for shard in info["shards"]], str(folder))
    _finish_cut_off(folder)
    with atomic_path(folder / NEXT_INDEX) as temporary:
        # Plain columns, no pandas metadata: the bytes depend on the content alone.
        table = pa.Table.from_pandas(index, preserve_index=False).replace_schema_metadata(None)
        pq.write_table(table, temporary, compression="zstd")
    complete[INDEX_HASH] = sha256_file(folder / NEXT_INDEX)
    write_sealed(folder / INFO_FILE, complete)
    _take_place(folder)
    return complete


def _take_place(folder: Path) -> None:
    os.replace(folder / NEXT_INDEX, folder / INDEX_FILE)
    sync_folder(folder)


def _finish_cut_off(folder: Path) -> None:
    """Finish the renaming that an interrupted writer left open, and remove temporary files of such writers."""
    if (folder / NEXT_INDEX).is_file() and (folder / INFO_FILE).is_file():
        wanted = read_sealed(folder / INFO_FILE, REMEDY)[0].get(INDEX_HASH)
        if wanted and sha256_file(folder / NEXT_INDEX) == wanted:
            _take_place(folder)
    for name in (INFO_FILE, NEXT_INDEX):
        for leftover in folder.glob(f".tmp-*-{name}"):
            match = re.fullmatch(rf"\.tmp-(\d+)-{re.escape(name)}", leftover.name)
            if match and not _runs(int(match[1])):
                remove(leftover)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
