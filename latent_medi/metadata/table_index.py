"""Reading a table of slides or patches as an index with patient, slide and fields; its audit and its splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.files import check_file
from latent_medi.metadata.audit import audit
from latent_medi.metadata.field_names import COUNTS
from latent_medi.metadata.fields import UNKNOWN_WORD, is_missing
from latent_medi.metadata.gdc_table import SITE_CODE, SITE_CODE_COLUMNS, with_folder_fields
from latent_medi.metadata.row_filter import only_mask, with_values_of
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.settings import AuditSettings, SplitSettings
from latent_medi.metadata.split_schemes import Split, make_split, needed_columns
from latent_medi.metadata.splits import split_column
from latent_medi.metadata.tables import ENDINGS, read_table, require_columns, write_table
from latent_medi.metadata.tcga import is_tcga, parse_barcode, read_site_codes, site_codes, warn_of_contradictions

PATIENT_COLUMNS = (
    "patient",
    "case_submitter_id",
    "patient_id",
    "case",
    "cases.submitter_id",
    "bcr_patient_barcode",
)
SLIDE_COLUMNS = ("slide", "slide_submitter_id", "slide_id")
_OWN_COLUMNS = ("key", "slide", "patient")


def is_table(path: str | Path) -> bool:
    """Whether a path is a table, not a dataset folder. True for every file: reading it explains a wrong ending."""
    path = Path(path)
    return not path.is_dir() and (path.suffix.lower() in ENDINGS or path.exists())


def read_table_index(
    path: str | Path,
    class_field: str = "",
    site_field: str = "",
    fields: Sequence[str] = (),
    patient_field: str = "",
    slide_field: str = "",
    continuous: Sequence[str] = (),
    to_institutions: bool = False,
) -> tuple[pd.DataFrame, Schema]:
    """Read a table as an index with ``key``, ``slide``, ``patient`` and fields.

    Missing cells become ``"unknown"``, or NaN in a continuous field. A column of TCGA site codes is corrected by the
    barcodes (blank cells, lost zeros). Fields of a TCGA-UT folder that the table lacks are derived from the GDC's
    columns (:func:`~latent_medi.metadata.gdc_table.with_folder_fields`).

    Args:
        path: CSV, TSV or Parquet.
        class_field: Class column; ``""`` for none.
        site_field: Site column; ``""`` for none.
        fields: Further categorical columns.
        patient_field: Patient column; ``""`` to look for the usual names.
        slide_field: Slide column; ``""`` to look for the usual names.
        continuous: Continuous columns.
        to_institutions: Whether the site is to be mapped to institutions: if there is no such column, it holds codes.

    Returns:
        The index, with the rows of the table in their order, and the schema of the fields.

    Raises:
        UserError: A column is absent, there is no patient, a site code contradicts its barcode, a cell of a continuous
            column is not a number, or a column is both categorical and continuous.
    """
    table = read_table(path)
    where = f"The table {path}"
    named = list(dict.fromkeys(n for n in (class_field, site_field, *fields) if n))
    numbers = list(dict.fromkeys(continuous))
    settings = {class_field: "class_field", site_field: "site_field", patient_field: "patient_field"}
    settings |= {slide_field: "slide_field"}
    slide = slide_field or next((n for n in SLIDE_COLUMNS if n in table.columns), "")
    patient = patient_field or next((n for n in PATIENT_COLUMNS if n in table.columns), "")
    require_columns(table, [n for n in (patient_field, slide_field) if n], where, settings)
    barcodes = next((n for n in (slide, patient) if n and is_tcga(table[n])), "")
    codes = site_field if to_institutions else ""
    table = with_folder_fields(table, [*named, *numbers], barcodes, where, codes)
    require_columns(table, [*named, *numbers], where, settings, _site_in_barcodes(table, site_field, barcodes))
    if both := [name for name in numbers if name in named]:
        raise UserError(f"{', '.join(both)} cannot be both continuous and a class or category.")
    if taken := [name for name in (*named, *numbers) if name in (*_OWN_COLUMNS, *COUNTS)]:
        raise UserError(
            f"{where}: a field cannot be called {taken[0]!r}, a name for patients, slides or counts.",
            "Rename the column.",
        )
    if not len(table):
        raise UserError(f"{where} has no row.")
    index = pd.DataFrame({"key": pd.RangeIndex(len(table))})
    index["slide"] = table[slide].to_numpy() if slide else index["key"].astype(str)
    if patient:
        index["patient"] = table[patient].to_numpy()
    elif barcodes:
        index["patient"] = [parse_barcode(name).patient for name in table[barcodes]]
    else:
        raise UserError(
            f"{where} has no patient: none of {', '.join(PATIENT_COLUMNS)}.",
            f"Name the column of patients with patient_field=…, one of {', '.join(map(str, table.columns))}.",
        )
    warn_of_contradictions(index["patient"], table, named, where)
    if (gone := index["patient"].map(is_missing)).any():
        raise UserError(f"{where}: row {int(gone.to_numpy().argmax()) + 1} has no patient ({int(gone.sum())} in all).")
    _add_fields(index, table, named, numbers, site_field, barcodes)
    categorical = [n for n in named if n != class_field]
    schema = Schema.from_table(index, class_field or None, categorical, numbers)
    for name in numbers:
        index[name] = pd.to_numeric(index[name].mask(index[name].map(is_missing)))
    return index, schema


def _site_in_barcodes(table: pd.DataFrame, site_field: str, barcodes: str) -> str:
    """What to do about a site that the table lacks and its barcodes hold; ``""`` in other cases."""
    if not barcodes or not site_field or site_field in table:
        return ""
    return (
        f"The barcodes in {barcodes} hold the site's code: site_field={SITE_CODE} reads it; audit and plan make it an "
        "institution with tss_table=…, the GDC's table of codes."
    )


def _add_fields(
    index: pd.DataFrame, table: pd.DataFrame, named: list[str], numbers: list[str], site_field: str, barcodes: str
) -> None:
    """Add the cells of the fields, site codes as the barcodes have them."""
    for name in named:
        cells = table[name]
        if name == site_field and name in SITE_CODE_COLUMNS and barcodes:
            cells = pd.Series(site_codes(table[barcodes], cells), index=table.index)
        values = {value: UNKNOWN_WORD if is_missing(value) else value for value in cells.unique()}
        index[name] = cells.map(values).to_numpy()
    for name in numbers:
        index[name] = table[name].to_numpy()


def institutions_of(codes: pd.Series, tss_table: str | Path) -> pd.DataFrame:
    """Source site, institution and kind of each tissue-source-site code.

    Args:
        codes: Codes, or ``"unknown"``.
        tss_table: GDC's table of codes.

    Returns:
        A row per code with the columns source_site, institution and kind.

    Raises:
        UserError: A code is not in the table.
    """
    known = read_site_codes(tss_table)
    if gone := sorted(set(codes) - set(known.index) - {UNKNOWN_WORD}):
        raise UserError(
            f"{len(gone)} site codes are not in {tss_table}: {', '.join(gone[:10])}.",
            "Download the latest table, or correct the codes.",
        )
    known.loc[UNKNOWN_WORD] = [UNKNOWN_WORD, "", UNKNOWN_WORD, "none"]
    return known.loc[codes, ["source_site", "institution", "kind"]].set_axis(codes.index)


def map_sites(
    index: pd.DataFrame, schema: Schema, site_field: str, tss_table: str | Path
) -> tuple[pd.DataFrame, Schema, pd.DataFrame]:
    """Replace tissue-source-site codes by institutions.

    Args:
        index: A row per patch or slide.
        schema: Its fields.
        site_field: The field of codes.
        tss_table: GDC's table of codes.

    Returns:
        The index, the schema with institutions as vocabulary of the site, and :func:`institutions_of` the rows.

    Raises:
        UserError: There is no such field, or a code is not in the table.
    """
    schema.field(site_field)
    mapped = institutions_of(index[site_field], tss_table)
    index = index.assign(**{site_field: mapped["institution"]})
    (new,) = Schema.from_table(index, None, [site_field]).fields
    return index, Schema(tuple(new if f.name == site_field else f for f in schema.fields)), mapped


def audit_table(settings: AuditSettings) -> dict[str, Any]:
    """The audit of a table, as returned by :func:`audit_index`; ``patches`` counts the rows of the ``table``.

    Raises:
        UserError: As for :func:`read_table_index` and the audit.
    """
    own = (settings.class_field, settings.site_field, *settings.fields, *settings.continuous, *_OWN_COLUMNS)
    filtered = [name for name in settings.only if name not in own]
    index, schema = read_table_index(
        settings.data,
        settings.class_field,
        settings.site_field,
        [*settings.fields, *filtered],
        settings.patient_field,
        settings.slide_field,
        settings.continuous,
        bool(settings.tss_table),
    )
    schema = schema.subset(name for name in schema.names if name not in filtered)
    return audit_index(index, schema, settings) | {"table": settings.data}


def audit_index(
    index: pd.DataFrame, schema: Schema, settings: AuditSettings, split: tuple[str, str] | None = None
) -> dict[str, Any]:
    """The audit of an index; with ``tss_table``, of institutions instead of site codes.

    Args:
        index: A row per patch or slide.
        schema: Its fields.
        settings: The settings.
        split: A split's name and part; ``None`` for all rows.

    Returns:
        As :func:`latent_medi.metadata.audit.audit`. With ``tss_table`` also ``institutions``: the numbers of codes, of
        source sites (names in the code table), of source sites with several classes, of institutions, of components of
        the graph of class and code, and of institutions by kind.

    Raises:
        UserError: As for the audit, or a code is not in the table.
    """
    if settings.only:
        index = index[only_mask(index, settings.only, settings.data or "the data")]
        schema = with_values_of(schema, index)
    site, thin = settings.site_field, settings.thin_patients
    if not settings.tss_table:
        return audit(index, schema, settings.requested or None, thin, split, site)
    of_codes = audit(index, schema, [], thin, split, site)
    rows = index if split is None else index[index[split_column(index, split[0])] == split[1]]
    known = schema.class_field
    rows, schema, mapped = map_sites(rows, schema, site, settings.tss_table)
    places = mapped[mapped["institution"] != UNKNOWN_WORD]
    classes = rows.loc[places.index, known.name] if known is not None else places["institution"]
    several = classes.groupby(places["source_site"]).nunique() > 1
    counts = {
        "codes": of_codes["sites"],
        "components_of_codes": of_codes["components"],
        "source_sites": len(several),
        "source_sites_with_several_classes": int(several.sum()),
        "institutions": int(places["institution"].nunique()),
        "kinds": {str(k): int(n) for k, n in places.drop_duplicates("institution")["kind"].value_counts().items()},
    }
    result = audit(rows, schema, settings.requested or None, thin, site_field=site)
    return result | {"split": of_codes["split"], "institutions": counts}


def split_table(settings: SplitSettings) -> tuple[Split, pd.DataFrame]:
    """Split the patients of a table, and write the table with the column ``split_<name>``.

    Returns:
        The split, and the index of the table.

    Raises:
        UserError: As for :func:`read_table_index` and :func:`~latent_medi.metadata.split_schemes.make_split`; or there
            is no ``out``, or the table already has this column.
    """
    if settings.table:
        raise UserError(
            "table= brings a split into a dataset folder, and data is a table too.", "Give the folder as data."
        )
    if not settings.out:
        raise UserError("No table to write is given.", "out=/path/to/slides_split.csv")
    check_file(settings.out, "table with a split", rb"PAR1|[^\n]*split_")
    table, column = read_table(settings.data), f"split_{settings.name}"
    if column in table.columns and not settings.replace:
        raise UserError(f"{settings.data} already has the column {column!r}.", "Choose another name, or replace=true.")
    names = needed_columns(settings)
    index, _ = read_table_index(
        settings.data,
        site_field=settings.site_field if settings.site_field in names else "",
        fields=names,
        patient_field=settings.patient_field,
        slide_field=settings.slide_field,
    )
    split = make_split(index, settings)
    table[column] = split.column.to_numpy()
    write_table(table, settings.out)
    return split, index
