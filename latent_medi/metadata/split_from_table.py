"""A split of a table brought into a dataset: by slide, or by patient if the table has no slide of the dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import sha256_file
from latent_medi.core.progress import get_logger
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.published_splits import (
    HOLD_OUT_SETTINGS,
    MEDI_SETTINGS,
    ROW_ORDER_SCHEMES,
    changed,
)
from latent_medi.metadata.settings import SplitSettings
from latent_medi.metadata.split_schemes import Split, make_split, needed_columns
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.metadata.table_index import read_table_index
from latent_medi.metadata.tables import read_table
from latent_medi.metadata.tcga import is_tcga, parse_barcode

logger = get_logger(__name__)

SPLIT_PREFIX = "split_"
_NO_PART = frozenset({"na", "n/a", "nan", "<na>", "none", "null", "-"})
"""Words by which other programs write an empty cell, in lower case."""


def split_from_table(index: pd.DataFrame, settings: SplitSettings) -> Split:
    """The split of a dataset that a table gives: its column, or what a published scheme makes of its rows.

    Args:
        index: A row per patch with ``slide`` and ``patient``.
        settings: ``table``, ``name`` and ``scheme``, and which columns of the table the scheme needs.

    Returns:
        The part of each row, ``""`` for slides that the table lacks, which a warning counts; in the recipe
        the table's name and SHA-256, what was joined (``joined_by``), and how many slides are in no part.

    Raises:
        UserError: The table has no such split, gives a slide two parts or a patient two parts, or has no slide or
            patient of the dataset.
    """
    rows, recipe = _of_table(settings)
    where = f"The table {settings.table}"
    names, unit = _plain_names(index["slide"]), "slide"
    if not names.isin(set(rows["slide"])).any():
        names, unit = _plain_names(index["patient"]), "patient"
    parts = _parts(rows, unit, where)
    listed = names.isin(set(parts.index))
    if not listed.any():
        raise UserError(
            f"{where} has none of the dataset's slides and patients, such as {index['slide'].iloc[0]!r} of patient "
            f"{index['patient'].iloc[0]!r}; it has {rows['slide'].iloc[0]!r} of {rows['patient'].iloc[0]!r}.",
            "Name its columns with slide_field=… and patient_field=….",
        )
    if not listed.all():
        gone = index.loc[~listed, "slide"]
        text = "%s lacks %d of %d slides (%d patches), such as %s: they are in no part of the split %r"
        count = index["slide"].nunique()
        logger.warning(text, where, gone.nunique(), count, len(gone), gone.iloc[0], settings.name)
    column = names.map(parts).fillna("").rename("split")
    if settings.allow_duplicates:
        recipe["allow_duplicates"] = list(settings.allow_duplicates)
    recipe |= {"table": Path(settings.table).name, "table_sha256": sha256_file(Path(settings.table))}
    recipe |= {"joined_by": unit, "slides_in_no_part": int(index.loc[column == "", "slide"].nunique())}
    return Split(column, recipe)


def refuse_row_order(settings: SplitSettings) -> None:
    """Refuse a scheme in which the order of rows decides for a dataset folder without a table.

    Raises:
        UserError: Says what the table is.
    """
    if settings.scheme in ROW_ORDER_SCHEMES and not settings.table:
        raise UserError(
            f"scheme={settings.scheme} depends on the order of rows, and the patches of a dataset folder have another "
            "order than the published table.",
            f"latent-medi split {settings.data} scheme={settings.scheme} site_field=tss table=all_slide_metadata.csv",
        )


def _of_table(settings: SplitSettings) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Slide, patient and part of each row of the table, and how the parts were made."""
    if settings.scheme == "hold_out" and (given := changed(settings, *HOLD_OUT_SETTINGS, *MEDI_SETTINGS)):
        raise UserError(
            f"table= gives the split, so that {', '.join(given)} would have no effect.",
            f"Leave out what the table decides, or make that split first: latent-medi split {settings.table} out=… "
            f"{given[0]}=…",
        )
    names = needed_columns(settings) if settings.scheme != "hold_out" else []
    rows, _ = read_table_index(
        settings.table,
        site_field=settings.site_field if settings.site_field in names else "",
        fields=names,
        patient_field=settings.patient_field,
        slide_field=settings.slide_field,
    )
    if settings.scheme != "hold_out":
        split = make_split(rows, settings)
        rows["part"], recipe = split.column, split.recipe
    else:
        table = read_table(settings.table)
        wanted = (SPLIT_PREFIX + settings.name, "split")
        column = next((name for name in wanted if name in table.columns), "")
        if not column:
            known = [str(c).removeprefix(SPLIT_PREFIX) for c in table.columns if str(c).startswith(SPLIT_PREFIX)]
            raise UserError(
                f"The table {settings.table} has no column {wanted[0]!r} or 'split'; {nearest(settings.name, known)}.",
                "Name the split with name=…, or make one: scheme=medi, or latent-medi split TABLE out=….",
            )
        rows["part"], recipe = ["" if is_missing(cell) else cell for cell in table[column]], {"kind": "of a table"}
        recipe["column"] = column
        _check_part_names(rows["part"], column, settings.table)
    return rows.assign(slide=_plain_names(rows["slide"]), patient=_plain_names(rows["patient"])), recipe


def _check_part_names(parts: pd.Series, column: str, table: str) -> None:
    """Refuse parts that are likely meant as another one, or as none.

    Raises:
        UserError: Names them.
    """
    count = parts.value_counts()
    names = sorted(name for name in count.index if name)
    if empty := [name for name in names if name.lower() in _NO_PART]:
        raise UserError(
            f"The table {table} has a part {empty[0]!r} in {column} ({count[empty[0]]} rows), a word for no value.",
            "Leave the cells of rows that are in no part empty, or give the part another name.",
        )
    for name in names:
        if alike := [other for other in names if other != name and other.lower() == name.lower()]:
            listed = ", ".join(f"{one!r} in {count[one]} rows" for one in (name, *alike))
            raise UserError(
                f"The table {table} has parts in {column} that differ in upper and lower case alone: {listed}.",
                "Write one part in one way.",
            )


def _parts(rows: pd.DataFrame, unit: str, where: str) -> pd.Series:
    """The part by slide or patient.

    Raises:
        UserError: Rows of one slide or patient give several parts.
    """
    pairs = rows[[unit, "part"]].drop_duplicates()
    if (twice := pairs[unit].duplicated(keep=False)).any():
        first = pairs.loc[twice, unit].iloc[0]
        words = " and ".join(repr(part or "no part") for part in sorted(pairs.loc[pairs[unit] == first, "part"]))
        count = pairs.loc[twice, unit].nunique()
        problem = f"{where} contradicts itself: {unit} {first!r} is in {words} ({count} such {unit}s)."
        raise UserError(problem, "Correct the table.")
    try:
        assert_patient_disjoint(rows, "part")
    except UserError as error:
        raise UserError(f"{where}: {error.message.removeprefix('part: ')}", error.hint) from None
    return pairs.set_index(unit)["part"]


def _plain_names(column: pd.Series) -> pd.Series:
    """Names as both sides write them: of TCGA slides and patients the barcodes, without folder, UUID and ending."""
    names = {name: str(parse_barcode(name)) if is_tcga([name.rpartition("/")[2]]) else name for name in column.unique()}
    return column.map(names)
