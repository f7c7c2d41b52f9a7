"""Tables as people make them: read as strings, so that no code is mistaken for a number or for missing data."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from latent_medi.errors import UserError, nearest
from latent_medi.files import atomic_path


def read_table(path: str | Path, strip: bool = True) -> pd.DataFrame:
    """Read a CSV, TSV or Parquet file, every cell as a string without blanks around it; empty cells are ``""``.

    ``NA`` stays ``"NA"`` (it is a tissue-source-site code) and ``01`` stays ``"01"``. A byte-order mark is skipped.

    Args:
        path: The file.
        strip: Whether blanks around cells go; those around column names always do.

    Raises:
        UserError: The file is absent, of another type, not UTF-8, ragged, empty, or has a column twice.
    """
    path = Path(path)
    kind = path.suffix.lower()
    try:
        if kind in (".csv", ".tsv"):
            return _read_text(path, "," if kind == ".csv" else "\t", strip)
        if kind in (".parquet", ".pq"):
            table = pq.read_table(path)
            return pd.DataFrame(
                {name: [_cell(v, strip) for v in table.column(name).to_pylist()] for name in table.column_names},
                dtype=str,
            )
    except FileNotFoundError:
        raise UserError(f"The table {path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"The table {path} is not UTF-8: {error}.", "Save it as UTF-8 (in a spreadsheet: CSV UTF-8)."
        ) from None
    except (OSError, pa.ArrowException, csv.Error) as error:
        raise UserError(f"The table {path} cannot be read: {error}.") from None
    raise UserError(f"The table {path} is neither .csv, .tsv nor .parquet.", "Save it as one of these.")


def _cell(value: object, strip: bool) -> str:
    text = "" if value is None or value != value else str(value)
    return text.strip() if strip else text


def _read_text(path: Path, separator: str, strip: bool) -> pd.DataFrame:
    # The csv module instead of pandas: it keeps every cell a string without options to forget, and a ragged row is an
    # error, not a shift.
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, strict=True)
        header = [name.strip() for name in next(reader, [])]
        if not any(header):
            raise UserError(f"The table {path} is empty.")
        if len(set(header)) < len(header):
            twice = sorted({name for name in header if header.count(name) > 1})
            raise UserError(f"The table {path} has columns of the same name: {twice}.")
        rows = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(f"Line {reader.line_num} of {path} has {len(row)} cells; the header has {len(header)}.")
            rows.append([cell.strip() for cell in row] if strip else row)
    return pd.DataFrame(rows, columns=header, dtype=str)


def require_columns(table: pd.DataFrame, names: Sequence[str], where: str) -> None:
    """Refuse a table that lacks a column.

    Raises:
        UserError: Names every absent column and the closest that ``where`` has.
    """
    columns = [str(c) for c in table.columns]
    if gone := [name for name in names if name not in columns]:
        raise UserError(
            f"{where} lacks " + "; ".join(f"column {name!r} ({nearest(name, columns)})" for name in gone) + "."
        )


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as .csv, .tsv or .parquet, whole or not at all.

    Raises:
        UserError: The path has another ending.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".csv", ".tsv", ".parquet", ".pq"):
        raise UserError(f"The table {path} is neither .csv, .tsv nor .parquet.", "Give it one of these endings.")
    with atomic_path(path) as temporary:
        if kind in (".csv", ".tsv"):
            table.to_csv(temporary, sep="," if kind == ".csv" else "\t", index=False, lineterminator="\n")
        else:
            table.to_parquet(temporary, index=False)
