"""An opened dataset folder: its schema, its index, and any patch by its row number."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import open_file, read_object
from latent_medi.core.locks import output_lock
from latent_medi.metadata.schema import Schema
from latent_medi.shards.checking.duplicates import check_pictures, find_duplicates
from latent_medi.shards.checking.verify import problems_of
from latent_medi.shards.format.codec import ORIGINS, decode_image
from latent_medi.shards.format.folder import INDEX_FILE, INFO_FILE, UNITS, read_folder, write_folder
from latent_medi.shards.format.layout import FIXED_COLUMNS, PATIENT, SPLIT_PREFIX, SUM_COLUMNS
from latent_medi.shards.format.selections import selection_columns

__all__ = ["FIXED_COLUMNS", "INDEX_FILE", "INFO_FILE", "RESTORE", "SPLIT_PREFIX", "UNITS", "PatchDataset"]

_USUAL_PARTS = ("train", "val", "test", "")  # of a split; no row needs to have them
_TRUTH = {"true": True, "false": False}
_REPLACE = "Choose another name, or replace it with replace=true."
RESTORE = "Restore the shard; `latent-medi shards verify` lists every damaged one."


class PatchDataset:
    """A dataset folder, opened. Pixels are read on demand; only the index is held in memory.

    Attributes:
        folder: The folder.
        info: The content of ``dataset.json``.
        schema: The fields of its patches.
        index: A row per patch in the order of the shards: key, shard, offset and size in bytes of the image inside the
            shard, image_crc32 and json_crc32 (of the bytes of the image and of the JSON member), origin, patient,
            slide, x, y, source_mpp, every field (a categorical one as string, a continuous one as float64 with NaN for
            unknown), further columns of the writer, ``split_<name>`` for each named split, the columns of each
            selection, image_fingerprint and shared_picture. Do not change it.
    """

    def __init__(self, folder: Path, info: dict[str, Any], schema: Schema, index: pd.DataFrame) -> None:
        self.folder = folder
        self.info = info
        self.schema = schema
        self.index = index

    @staticmethod
    def open(folder: str | Path) -> PatchDataset:
        """Open a finished dataset folder.

        Raises:
            UserError: It is absent, unfinished, damaged, written by a newer version, or its index does not fit its
                ``dataset.json``.
        """
        folder = Path(folder)
        if not (folder / INFO_FILE).is_file():
            state = "is not finished" if (folder / ".progress").is_dir() else "is no dataset folder"
            raise UserError(f"{folder} {state}: it has no {INFO_FILE}.", "Run the step that writes it (again).")
        return PatchDataset(folder, *read_folder(folder))

    def __len__(self) -> int:
        return len(self.index)

    def __repr__(self) -> str:
        return f"PatchDataset({str(self.folder)!r}, {len(self)} patches of {self.patch_size} px)"

    @property
    def name(self) -> str:
        """The dataset's name."""
        return self.info["name"]

    @property
    def patch_size(self) -> int:
        """Edge of a patch in pixels."""
        return self.info["patch_size"]

    @property
    def patient_is(self) -> str:
        """What the column of patients holds: "patient", or what stands for patients that are not known: "slide",
        "image" or "group"."""
        return self.info.get("patient_is", PATIENT)

    @property
    def patients_note(self) -> str:
        """What a reader must know where patients are not known; "" where they are."""
        if self.patient_is == PATIENT:
            return ""
        return (
            f"Patients are not known: each {self.patient_is} counts as one. Images of one person can be in several "
            "parts of a split, so that scores are too good and intervals too narrow for new patients."
        )

    @property
    def splits(self) -> list[str]:
        """Names of the recorded splits; the column of each is ``split_<name>``."""
        return list(self.info["splits"])

    @property
    def selections(self) -> dict[str, dict[str, Any]]:
        """Recipe and result of each recorded selection; the column of each is ``selected_<name>``."""
        return dict(self.info.get("selections", {}))

    def read(self, rows: Sequence[int] | np.ndarray, workers: int = 0) -> np.ndarray:
        """Patches by row number, in the order of ``rows``.

        Args:
            rows: Row numbers of the index, repeats allowed.
            workers: Threads that decode; 0 decodes in the caller's.

        Returns:
            uint8 [n, H, W, 3], RGB.

        Raises:
            UserError: A patch is damaged or missing (named), or a row number is out of range.
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise UserError(f"Row numbers run from 0 to {len(self) - 1}, not {rows.min()} to {rows.max()}.")
        out = np.empty((len(rows), self.patch_size, self.patch_size, 3), dtype=np.uint8)
        # Rows follow the shards, and the offsets within each: sorted, each file is read once from start to end.
        order = np.argsort(rows, kind="stable")
        if workers > 0 and len(rows) > 1:
            parts = np.array_split(order, min(len(rows), 4 * workers))
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda part: self._read_into(out, rows, part), parts))
        else:
            self._read_into(out, rows, order)
        return out

    def _read_into(self, out: np.ndarray, rows: np.ndarray, positions: np.ndarray) -> None:
        chosen = rows[positions]
        names, *columns = self._places
        open_shard, handle = -1, -1
        try:
            for position, row, shard, offset, size in zip(
                positions.tolist(), chosen.tolist(), *(c[chosen].tolist() for c in columns), strict=True
            ):
                if shard != open_shard:
                    if handle >= 0:
                        os.close(handle)
                        handle = -1
                    open_shard, handle = shard, self._open_shard(names[shard])
                try:
                    data = os.pread(handle, size, offset)
                except OSError as error:
                    raise UserError(f"{self._patch(row)} cannot be read: {error.strerror}.", RESTORE) from None
                out[position] = self._decode(data, row)
        finally:
            if handle >= 0:
                os.close(handle)

    @cached_property
    def _places(self) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """Names of the shards; by row the shard's position among them, the image's offset and its size, int64 [n]."""
        codes, names = pd.factorize(self.index["shard"])
        return [str(name) for name in names], codes, *(self.index[c].to_numpy(np.int64) for c in ("offset", "size"))

    @cached_property
    def _sums(self) -> np.ndarray | None:
        """By row, the CRC-32 of the image and of the JSON member, uint32 [n, 2]; ``None`` in an earlier version's
        folder.
        """
        there = set(SUM_COLUMNS) <= set(self.index.columns)
        return self.index[list(SUM_COLUMNS)].to_numpy(np.uint32) if there else None

    @cached_property
    def rows_of_shard(self) -> dict[str, np.ndarray]:
        """Row numbers by shard, ascending, int64."""
        found = self.index.groupby("shard", sort=False).indices
        return {str(shard): np.sort(rows).astype(np.int64) for shard, rows in found.items()}

    def open_shard(self, file: str) -> BinaryIO:
        """A shard as a stream of bytes.

        Raises:
            UserError: It cannot be opened.
        """
        return os.fdopen(self._open_shard(file), "rb")

    def _open_shard(self, shard: str) -> int:
        return open_file(self.folder / shard, "Restore it, or write the dataset again.")

    def place_of(self, file: str) -> str:
        """The name of a file of the folder in messages."""
        return str(self.folder / file)

    def check_member(self, row: int, data: bytes, image: bool) -> None:
        """Compare the bytes of an image file (or of a JSON member) with their checksum in the index.

        Raises:
            UserError: They differ; names the patch and its shard.
        """
        if self._sums is not None and zlib.crc32(data) != self._sums[row, 0 if image else 1]:
            what = "its image" if image else "its JSON member"
            raise UserError(f"{self._patch(row)}: {what} is damaged, its checksum differs.", RESTORE)

    def _patch(self, row: int) -> str:
        return f"patch {self.index['key'].iloc[row]!r} in {self.place_of(self.index['shard'].iloc[row])}"

    def _decode(self, data: bytes, row: int) -> np.ndarray:
        size = self.patch_size
        self.check_member(row, data, image=True)
        try:
            image = decode_image(data)
            if image.shape != (size, size, 3):
                raise UserError(f"It is {image.shape[1]}×{image.shape[0]}, not {size}×{size}.")
        except UserError as error:
            raise UserError(f"{self._patch(row)}: {error.message}", RESTORE) from None
        return image

    def iterate(
        self, rows: Sequence[int] | np.ndarray | None, batch: int, workers: int = 0
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches of patches in the order of ``rows`` (all rows if ``None``); the last one may be short.

        Yields:
            Row numbers int64 [n] and patches uint8 [n, H, W, 3].
        """
        if batch < 1:
            raise UserError(f"The batch is {batch}; it is at least 1.")
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows, dtype=np.int64).reshape(-1)
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            yield part, self.read(part, workers)

    def rows(self, where: Mapping[str, str | bool | Sequence[str]] | None = None) -> np.ndarray:
        """Row numbers of the patches that have one of the given values in every given column, ascending, int64.

        Args:
            where: Value or values by column: fields, ``split_<name>``, ``origin``, ``patient`` … Of a continuous field
                ``"unknown"``, of ``selected_<name>`` true or false.

        Raises:
            UserError: There is no such column, field value or split name; names the closest.
        """
        keep = np.ones(len(self), dtype=bool)
        for column, wanted in (where or {}).items():
            values = [wanted] if isinstance(wanted, (str, int, float)) else list(wanted)
            keep &= self._matches(column, values)
        return np.flatnonzero(keep)

    def _matches(self, column: str, values: list[Any]) -> np.ndarray:
        content = self._column(column)
        if column in self.schema.names:
            known = self.schema.field(column)
            codes = [known.code(v) for v in values]
            if known.continuous:
                numbers = [float(v) for v, code in zip(values, codes, strict=True) if code != 1]
                return (content.isin(numbers) | (content.isna() if 1 in codes else False)).to_numpy(bool)
            values = [known.value(code) for code in codes]
        elif content.dtype == bool:
            if bad := [v for v in values if str(v).lower() not in _TRUTH]:
                raise UserError(f"Column {column!r} is true or false, not {bad[0]!r}.")
            values = [_TRUTH[str(v).lower()] for v in values]
        elif column.startswith(SPLIT_PREFIX) or column == "origin":
            known_values = {*content.unique(), *(ORIGINS if column == "origin" else _USUAL_PARTS)}
            if bad := [v for v in values if v not in known_values]:
                closest = nearest(str(bad[0]), sorted(known_values - {""}))
                raise UserError(f"Column {column!r} has no value {bad[0]!r}; {closest}.")
        return content.isin(values).to_numpy(bool)

    def _column(self, column: str) -> pd.Series:
        if column in self.index.columns:
            return self.index[column]
        if not column.startswith(SPLIT_PREFIX):
            raise UserError(f"{self.folder} has no column {column!r}; {nearest(column, self.index.columns)}.")
        name = column.removeprefix(SPLIT_PREFIX)
        problem = f"{self.folder} has no split {name!r}; {nearest(name, self.splits)}."
        raise UserError(problem, f"`latent-medi split {self.folder} name={name} …` makes one.")

    def add_split(
        self, name: str, column: pd.Series | Sequence[str], recipe: Mapping[str, Any], replace: bool = False
    ) -> None:
        """Record a named split as the column ``split_<name>`` of the index. No patch is moved.

        Args:
            name: Letters, digits and underscores.
            column: The part of each row, in the index's order; ``""`` for none.
            recipe: JSON-able: how it was made; ``allow_duplicates`` in it names patients whose pictures may be in
                several parts (``"*"``: all).
            replace: Whether a different split of that name may be replaced; an interruption leaves either.

        Raises:
            UserError: A patient or a picture is in two parts, a synthetic patch is in a part other than ``train…``, or
                the name is taken.
        """
        if not re.fullmatch("[A-Za-z0-9_]+", name):
            raise UserError(f"A split's name has letters, digits and underscores only, not {name!r}.")
        if len(column) != len(self):
            raise UserError(f"The split {name!r} has {len(column)} rows; the dataset has {len(self)}.")
        values = ["" if pd.isna(v) else str(v) for v in column]
        label = SPLIT_PREFIX + name
        if name in self.info["splits"] and not replace and values != self.index[label].tolist():
            raise UserError(f"{self.folder} already has another split {name!r}.", _REPLACE)
        find_duplicates(self)
        index = self.index.assign(**{label: values})
        check_pictures(index, index[label], name, recipe)
        info = {**self.info, "splits": {**self.info["splits"], name: {"recipe": dict(recipe)}}}
        with output_lock(self.folder):
            self._check_unchanged()
            self.info, self.index = write_folder(self.folder, info, index), index

    def remove_split(self, name: str) -> None:
        """Remove a split that was recorded; every other file and column stays as it is."""
        index = self.index.drop(columns=SPLIT_PREFIX + name)
        info = {**self.info, "splits": {other: entry for other, entry in self.info["splits"].items() if other != name}}
        with output_lock(self.folder):
            self._check_unchanged()
            self.info, self.index = write_folder(self.folder, info, index), index

    def add_selection(
        self,
        name: str,
        columns: Mapping[str, np.ndarray],
        recipe: Mapping[str, Any],
        result: Mapping[str, Any],
        replace: bool = False,
    ) -> None:
        """Record a selection of patches as columns ``selected_<name>…`` of the index. No patch is moved or removed.

        Args:
            name: Letters, digits and underscores; without the ending of another selection's column.
            columns: By entry of ``SELECTION_PARTS``, a value per row in the index's order: bool for the choice and its
                control, float64 for the score.
            recipe: JSON-able: all that the choice depends on.
            result: JSON-able: its outcome.
            replace: Whether another selection of that name may be replaced; an interruption leaves either.

        Raises:
            UserError: A name that cannot be used, columns that do not fit, or the name is taken.
        """
        values = selection_columns(name, columns, len(self))
        entry = {"recipe": dict(recipe), "result": dict(result), "columns": dict.fromkeys(values)}
        with output_lock(self.folder):
            self._check_unchanged()
            selections, index = self.selections, self.index
            if before := selections.pop(name, None):
                if not replace:
                    raise UserError(f"{self.folder} already has a selection {name!r}.", _REPLACE)
                index = index.drop(columns=list(before["columns"]))
            index = index.assign(**values)
            info = {**self.info, "selections": {**selections, name: entry}}
            self.info, self.index = write_folder(self.folder, info, index), index

    def _check_unchanged(self) -> None:
        """Refuse to overwrite what another process has written since this dataset was opened.

        Raises:
            UserError: Its splits, selections or index have changed.
        """
        now = read_object(self.folder / INFO_FILE)
        for part in ("index_sha256", "splits", "selections"):
            if now.get(part) != json.loads(json.dumps(self.info.get(part))):
                raise UserError(f"{self.folder} has changed since it was opened ({part}).", "Open it again.")

    def counts(self, row_field: str, column_field: str, unit: str = "patches") -> pd.DataFrame:
        """A table of counts by two columns of the index, with empty combinations and unused values of a vocabulary.

        Args:
            row_field: Column for the rows.
            column_field: Column for the columns.
            unit: ``patches``, ``patients`` or ``slides``.
        """
        if unit not in UNITS:
            raise UserError(f"Counts are in {', '.join(UNITS)}, not {unit!r}.")
        for column in (row_field, column_field):
            self._column(column)
        distinct = self.index.drop_duplicates([row_field, column_field, UNITS[unit]])
        table = pd.crosstab(distinct[row_field], distinct[column_field])
        axes = []
        for column, found in ((row_field, table.index), (column_field, table.columns)):
            listed = list(self.schema.field(column).values) if column in self.schema.names else []
            axes.append(listed + [v for v in found if v not in listed])
        table = table.reindex(index=axes[0], columns=axes[1], fill_value=0)
        return table.rename_axis(index=row_field, columns=column_field)

    def verify(self, images: bool = False) -> list[str]:
        """Every problem of the folder, in words.

        Args:
            images: Also decode every patch.
        """
        return problems_of(self, images)
