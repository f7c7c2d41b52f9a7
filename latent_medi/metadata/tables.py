"""Reading and writing tables. All cells are read as text, so that no code becomes a number or missing data."""

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
from latent_medi.metadata.table_cleaning import Row, tidy

logger = get_logger(__name__)

ENDINGS = (".csv", ".tsv", ".parquet", ".pq")
"""Endings of files that are read as tables."""
_AS_CSV = "Save it as CSV UTF-8 with commas and decimal points (in a spreadsheet: Save as)."
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# First line that Excel writes and reads to give the separator.
_SEPARATOR_LINE = re.compile(r'"?sep=(?P<sign>[^\r\n])"?[,;\t]*[\r\n]*', re.IGNORECASE)
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_ZIP = b"PK\x03\x04"
_MOST_COLUMNS = 30
# With apostrophes before it, so that text that begins with one is read back unchanged.
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")


def read_table(path: str | Path, strip: bool = True) -> pd.DataFrame:
    """Read a CSV, TSV or Parquet file with all cells as text; empty cells are ``""``.

    ``NA`` stays ``"NA"`` (it is a tissue-source-site code) and ``01`` stays ``"01"``. A byte-order mark is skipped.
    Empty rows, columns that have no name, title lines and repeated rows of headings are left out, with a warning that
    names their lines.

    Args:
        path: The file.
        strip: Whether to strip blanks around cells; column names are always stripped.

    Raises:
        UserError: The file is absent, no regular file, of another type, has another separator, is neither UTF-8 nor
            UTF-16, is ragged or empty, or has a column twice.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in ENDINGS and not path.is_dir():
        raise UserError(f"The table {path} is neither .csv, .tsv nor .parquet.", _AS_CSV)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or device may block
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or device"
            raise UserError(f"{path} is {what}, not a table.", "Give a .csv, .tsv or .parquet file.")
        is_text = kind in (".csv", ".tsv")
        rows = _read_text(path, "," if kind == ".csv" else "\t") if is_text else _read_parquet(path)
    except FileNotFoundError:
        raise UserError(f"The table {path} does not exist.", "Check the path.") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"The table {path} cannot be read: {error}.", "Check it, or save it again.") from None
    names, cells, left_out = tidy(rows, str(path), titles=is_text)
    for note in left_out:
        _warn_once(f"{path}: {note}", status.st_mtime_ns)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UserError(f"The table {path} has columns of the same name: {twice}.", "Rename or remove one of each.")
    if strip:
        cells = [[cell.strip() for cell in row] for row in cells]
    return pd.DataFrame(cells, columns=names, dtype=str)


@lru_cache(maxsize=256)  # a command may read a table several times
def _warn_once(note: str, changed_ns: int) -> None:
    logger.warning("%s", note)


def _read_parquet(path: Path) -> list[Row]:
    table = pq.read_table(path)
    columns = [["" if v is None or v != v else str(v) for v in column.to_pylist()] for column in table.columns]
    names = Row(0, [str(name) for name in table.column_names])
    return [names, *(Row(i, list(cells)) for i, cells in enumerate(zip(*columns, strict=True), 1))]


def _read_text(path: Path, separator: str) -> list[Row]:
    with open(path, "rb") as raw:
        start = raw.read(4)
    if start == _ZIP:
        raise UserError(f"{path} is a spreadsheet file with another ending, not text.", _AS_CSV)
    try:
        with open(path, encoding="utf-16" if start[:2] in _UTF16 else "utf-8-sig", newline="") as file:
            first = file.readline()
            declared = _SEPARATOR_LINE.fullmatch(first)
            if declared and declared["sign"] != separator:
                raise _other_separator(path, declared["sign"], separator)
            rows = _rows(path, file if declared else chain([first], file), separator, skipped=int(bool(declared)))
    except UnicodeError:
        hint = "Save it as UTF-8 (in a spreadsheet: CSV UTF-8)."
        raise UserError(f"{path} is not UTF-8{_not_utf8(path)}.", hint) from None
    head = [row for row in rows if row.filled][:2]
    if any("\0" in cell for row in head[:1] for cell in row.cells):
        raise UserError(f"{path} is not text, or is UTF-16 without a byte-order mark.", "Save it as UTF-8.")
    if head:
        _refuse_other_separator(path, head[0].cells, head[-1].cells, separator)
    return rows


def _rows(path: Path, lines: Iterable[str], separator: str, skipped: int) -> list[Row]:
    # Unlike pandas, the csv module keeps all cells as text and does not shift the cells of ragged rows.
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        return [Row(reader.line_num + skipped, cells) for cells in reader if cells]
    except csv.Error as error:
        line = reader.line_num + skipped
        raise UserError(
            f"The table {path} cannot be read: {error}, in line {line}.", 'Check the quotes (") in it.'
        ) from None


def _not_utf8(path: Path) -> str:
    """Where the first line is that is not UTF-8, and its text if it is Windows-1252."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            near = line[max(0, error.start - 15) : error.start + 15].decode("cp1252", "replace")
            return f": line {number} has {near!r} if it is Windows-1252"
    return ""


def _refuse_other_separator(path: Path, first: Sequence[str], second: Sequence[str], separator: str) -> None:
    """Refuse a file with another separator; with semicolons, numbers would have a decimal comma."""
    if sum(bool(cell.strip()) for cell in first) > 1:
        return
    for sign in _SEPARATORS:
        # A title may have a semicolon too, but rarely as many as the next line.
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
    table: pd.DataFrame, names: Sequence[str], where: str, settings: Mapping[str, str] | None = None, more: str = ""
) -> None:
    """Refuse a table that lacks a column.

    Args:
        table: The table.
        names: Columns that it must have.
        where: The table, for the message.
        settings: The setting that names a column, by column.
        more: A further sentence on what to do.

    Raises:
        UserError: Names all absent columns, the closest existing ones, and the settings.
    """
    columns = [str(c) for c in table.columns]
    gone = [name for name in dict.fromkeys(names) if name not in columns]
    if not gone:
        return
    hint = f"Its columns: {', '.join(columns[:_MOST_COLUMNS])}"
    hint += f" … ({len(columns)} in all)." if len(columns) > _MOST_COLUMNS else "."
    if given := list(dict.fromkeys(settings[name] for name in gone if name in settings) if settings else ()):
        hint += f" Choose one with {', '.join(f'{setting}=…' for setting in given)}."
    raise UserError(
        f"{where} lacks " + "; ".join(f"column {name!r} ({nearest(name, columns)})" for name in gone) + ".",
        f"{hint} {more}".strip(),
    )


def say_what_is_left(table: pd.DataFrame, taken: Iterable[str], where: str) -> None:
    """Name the columns of a table that do not go into a dataset folder: the hospital may be one of them."""
    if left := [str(column) for column in table.columns if column not in set(taken)]:
        logger.info(
            "%s: not taken are the columns %s. categorical=[…] or continuous=[…] makes fields of them, extra=[…] "
            "columns of the index.",
            where, ", ".join(left),
        )  # fmt: skip


def settings_of_columns(settings: Any, *names: str) -> dict[str, str]:
    """The setting that names a column, by column, for :func:`require_columns`.

    Args:
        settings: A settings dataclass.
        names: Its settings that name one or several columns.
    """
    named: dict[str, str] = {}
    for name in names:
        value = getattr(settings, name)
        for column in [value] if isinstance(value, str) else value:
            named.setdefault(column, name)
    return named


def escape_cell(text: str) -> str:
    """``text`` with an apostrophe before it if a spreadsheet would run it as a formula; numbers are not changed."""
    if not _FORMULA.match(text):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def unescape_cell(text: str) -> str:
    """The text that :func:`escape_cell` returned ``text`` for."""
    return text[1:] if text.startswith("'") and escape_cell(text[1:]) == text else text


def write_for_people(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as CSV, atomically, with text escaped that a spreadsheet would run as a formula.

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
    """A table read as text that :func:`write_for_people` wrote, with the escapes removed."""
    return table.rename(columns=unescape_cell).map(unescape_cell)


def write_table(table: pd.DataFrame, path: str | Path) -> None:
    """Write a table as .csv, .tsv or .parquet, atomically.

    Raises:
        UserError: The path has another ending.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in ENDINGS:
        raise UserError(f"The table {path} is neither .csv, .tsv nor .parquet.", "Give it one of these endings.")
    with atomic_path(path) as temporary:
        if kind in (".csv", ".tsv"):
            table.to_csv(temporary, sep="," if kind == ".csv" else "\t", index=False, lineterminator="\n")
        else:
            table.to_parquet(temporary, index=False)
