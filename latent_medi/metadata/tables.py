"""Tables as people make them: read as strings, so that no code is mistaken for a number or for missing data."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from latent_medi.errors import UserError, nearest
from latent_medi.files import atomic_path

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_MOST_COLUMNS = 30
# Apostrophes before it too, so that what begins with one is told apart when it is read back.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def read_table(path: str | Path, strip: bool = True) -> pd.DataFrame:
    """Read a CSV, TSV or Parquet file, every cell as a string without blanks around it; empty cells are ``""``.

    ``NA`` stays ``"NA"`` (it is a tissue-source-site code) and ``01`` stays ``"01"``. A byte-order mark is skipped.

    Args:
        path: The file.
        strip: Whether blanks around cells go; those around column names always do.

    Raises:
        UserError: The file is absent, of another type, separated by something else, not UTF-8, ragged, empty, or has a
            column twice.
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
        # Not read as it is: where cells are separated by semicolons, numbers have a decimal comma.
        others = [words for sign, words in _SEPARATORS.items() if sign != separator and sign in header[0]]
        if len(header) == 1 and others:
            raise UserError(
                f"The table {path} separates its columns by {others[0]}, not by {_SEPARATORS[separator]}.",
                "Save it as .csv with commas and decimal points, or as .tsv with tabs.",
            )
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


def require_columns(
    table: pd.DataFrame, names: Sequence[str], where: str, settings: Mapping[str, str] | None = None
) -> None:
    """Refuse a table that lacks a column.

    Args:
        table: The table.
        names: Columns that it must have.
        where: The table in words.
        settings: The setting that names a column, by column.

    Raises:
        UserError: Names every absent column, the closest that ``where`` has, all that it has, and the settings.
    """
    columns = [str(c) for c in table.columns]
    gone = [name for name in dict.fromkeys(names) if name not in columns]
    if not gone:
        return
    hint = f"Its columns: {', '.join(columns[:_MOST_COLUMNS])}"
    hint += f" … ({len(columns)} in all)." if len(columns) > _MOST_COLUMNS else "."
    if told := list(dict.fromkeys(settings[name] for name in gone if name in settings) if settings else ()):
        hint += f" Say which to take with {', '.join(f'{setting}=…' for setting in told)}."
    raise UserError(
        f"{where} lacks " + "; ".join(f"column {name!r} ({nearest(name, columns)})" for name in gone) + ".", hint
    )


def settings_of_columns(settings: Any, *names: str) -> dict[str, str]:
    """The setting that names a column, by column; for :func:`require_columns`.

    Args:
        settings: A settings dataclass.
        names: Its entries that hold a column or several.
    """
    named: dict[str, str] = {}
    for name in names:
        value = getattr(settings, name)
        for column in [value] if isinstance(value, str) else value:
            named.setdefault(column, name)
    return named


def escape_cell(text: str) -> str:
    """``text`` with an apostrophe before it if a spreadsheet would run it as a formula; numbers stay."""
    if not _FORMULA.match(text):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def unescape_cell(text: str) -> str:
    """What :func:`escape_cell` was given."""
    return text[1:] if text.startswith("'") and escape_cell(text[1:]) == text else text


def write_for_people(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV for people, whole or not at all: text that a spreadsheet would run is escaped.

    Args:
        table: The table; names of columns are strings.
        path: The file.
    """
    cells = table.rename(columns=lambda name: escape_cell(str(name)))
    for position, kind in enumerate(cells.dtypes):
        if not pd.api.types.is_numeric_dtype(kind):
            column = cells.iloc[:, position].astype(object)
            cells.isetitem(position, column.map(lambda cell: escape_cell(cell) if isinstance(cell, str) else cell))
    with atomic_path(path) as temporary:
        cells.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\n")


def written_for_people(table: pd.DataFrame) -> pd.DataFrame:
    """A table of strings that :func:`write_for_people` wrote, and a spreadsheet may have saved again, as it was."""
    return table.rename(columns=unescape_cell).map(unescape_cell)


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
