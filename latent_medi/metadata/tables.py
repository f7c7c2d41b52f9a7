"""Tables as people make them: read as strings, so that no code is mistaken for a number or for missing data."""

from __future__ import annotations

import csv
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import atomic_path
from latent_medi.core.progress import get_logger
from latent_medi.metadata.leftovers import Row, tidy

logger = get_logger(__name__)

ENDINGS = (".csv", ".tsv", ".parquet", ".pq")
"""Endings of the files that are read as tables."""
_AS_CSV = "Save it as CSV UTF-8 with commas and decimal points (in a spreadsheet: Save as)."
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# What Excel writes and reads as the first line, to tell the separator.
_SEPARATOR_LINE = re.compile(r'"?sep=(?P<sign>[^\r\n])"?[,;\t]*[\r\n]*', re.IGNORECASE)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ZIP = b"PK\x03\x04"
_MOST_COLUMNS = 30
# Apostrophes before it too, so that what begins with one is told apart when it is read back.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def read_table(path: str | Path, strip: bool = True) -> pd.DataFrame:
    """Read a CSV, TSV or Parquet file, every cell as a string without blanks around it; empty cells are ``""``.

    ``NA`` stays ``"NA"`` (it is a tissue-source-site code) and ``01`` stays ``"01"``. A byte-order mark is skipped.
    What a spreadsheet or a download leaves beside the data is left out, named in the log with its lines: empty rows,
    columns without a name, title lines, and further rows of headings (a repeated header, a biotab's).

    Args:
        path: The file.
        strip: Whether blanks around cells go; those around column names always do.

    Raises:
        UserError: The file is absent, no file, of another type, separated by something else, neither UTF-8 nor UTF-16,
            ragged, empty, or has a column twice.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in ENDINGS and not path.is_dir():
        raise UserError(f"The table {path} is neither .csv, .tsv nor .parquet.", _AS_CSV)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or device may wait for ever
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise UserError(f"{path} is {what}, not a table.", "Give a .csv, .tsv or .parquet file.")
        is_text = kind in (".csv", ".tsv")
        rows = _read_text(path, "," if kind == ".csv" else "\t") if is_text else _read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"The table {path} does not exist.", "Check the path.") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"The table {path} cannot be read: {error}.", "Check it, or save it again.") from None
    names, cells, left_out = tidy(rows, str(path), titles=is_text)
    for words in left_out:
        _say(f"{path}: {words}", status.st_mtime_ns)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"The table {path} has columns of the same name: {twice}.", "Rename or remove one of each.")
    if strip:
        cells = [[cell.strip() for cell in row] for row in cells]
    return pd.DataFrame(cells, columns=names, dtype=str)


@lru_cache(maxsize=256)  # a command may read a table twice; a change of the file is told again
def _say(words: str, changed_ns: int) -> None:
    logger.warning("%s", words)


def _read_parquet(path: Path) -> list[Row]:
    table = pq.read_table(path)
    columns = [["" if v is None or v != v else str(v) for v in column.to_pylist()] for column in table.columns]
    names = Row(0, [str(name) for name in table.column_names])
    return [names, *(Row(i, list(cells)) for i, cells in enumerate(zip(*columns, strict=True), 1))]


def _read_text(path: Path, separator: str) -> list[Row]:
    with open(path, "rb") as raw:
        start = raw.read(4)
    if start == _ZIP:
        raise UserError(f"{path} is a spreadsheet by another name, not text.", _AS_CSV)
    try:
        with open(path, encoding="utf-16" if start[:2] in _UTF16 else "utf-8-sig", newline="") as file:
            first = file.readline()
            told = _SEPARATOR_LINE.fullmatch(first)
            if told and told["sign"] != separator:
                raise _other_separator(path, told["sign"], separator)
            rows = _rows(path, file if told else chain([first], file), separator, skipped=int(bool(told)))
    except UnicodeError:
        raise UserError(
            f"{path} is not UTF-8{_where(path)}.", "Save it as UTF-8 (in a spreadsheet: CSV UTF-8)."
        ) from None
    head = [row for row in rows if row.filled][:2]
    if any("\0" in cell for row in head[:1] for cell in row.cells):
        raise UserError(f"{path} is no text, or UTF-16 without its mark.", "Save it as UTF-8.")
    if head:
        _refuse_other_separator(path, head[0].cells, head[-1].cells, separator)
    return rows


def _rows(path: Path, lines: Iterable[str], separator: str, skipped: int) -> list[Row]:
    # The csv module instead of pandas: it keeps every cell a string without options to forget, and a ragged row is an
    # error, not a shift.
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        return [Row(reader.line_num + skipped, cells) for cells in reader if cells]
    except csv.Error as error:
        line = reader.line_num + skipped
        raise UserError(
            f"The table {path} cannot be read: {error}, in line {line}.", 'Check the quotes (") in it.'
        ) from None


def _where(path: Path) -> str:
    """Where the first line is that is no UTF-8, and how it reads in the encoding that it probably has."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            near = line[max(0, error.start - 15) : error.start + 15].decode("cp1252", "replace")
            return f": line {number} has {near!r} if it is Windows-1252"
    return ""


def _refuse_other_separator(path: Path, first: Sequence[str], second: Sequence[str], separator: str) -> None:
    """Not read as it is: where cells are separated by semicolons, numbers have a decimal comma."""
    if sum(bool(cell.strip()) for cell in first) > 1:
        return
    for sign in _SEPARATORS:
        # A title may hold a semicolon too, but seldom as many as the line below it.
        count = separator.join(first).count(sign)
        if sign != separator and count and count == separator.join(second).count(sign):
            raise _other_separator(path, sign, separator)


def _other_separator(path: Path, sign: str, separator: str) -> UserError:
    return UserError(
        f"The table {path} separates its columns by {_SEPARATORS.get(sign, repr(sign))}, not by "
        f"{_SEPARATORS[separator]}.",
        "Save it as .csv with commas and decimal points, or as .tsv with tabs.",
    )


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
