"""Removing what spreadsheets and downloads add to a table: titles, empty rows, unnamed columns, repeated headings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latent_medi.core.errors import UserError

_MOST_TITLES = 10
_MOST_NAMED = 5
_CDE = "CDE_ID:"
"""Prefix of every cell in the third heading row of a TCGA biotab."""


@dataclass(frozen=True)
class Row:
    """A row of a file: the number of its last line, from 1, and its cells."""

    line: int
    cells: list[str]

    @property
    def filled(self) -> int:
        """Number of cells that are not blank."""
        return sum(bool(cell.strip()) for cell in self.cells)


def tidy(rows: Sequence[Row], where: str, titles: bool = True) -> tuple[list[str], list[list[str]], list[str]]:
    """Column names and cells of a table without empty rows, columns that have no name, title lines above the column
    names, repeated column names, and the two further heading rows of a TCGA biotab.

    Args:
        rows: The rows in their order, with the column names.
        where: The table, for messages.
        titles: Whether there may be title lines above the column names.

    Returns:
        Names, stripped and not empty; rows with a cell for each name; and a sentence on each thing left out.

    Raises:
        UserError: There is no column name, or a row has more or fewer cells than names.
    """
    notes: list[str] = []
    empty = [row.line for row in rows if not row.filled]
    rows = [row for row in rows if row.filled]
    if not rows:
        raise UserError(f"The table {where} is empty.", "A table needs a line of column names, and rows below it.")
    above = _titles(rows) if titles else 0
    for row in rows[:above]:
        title = next(cell.strip() for cell in row.cells if cell.strip())
        notes.append(f"line {row.line} is left out: a title above the column names, {title[:80]!r}")
    names, rows = [cell.strip() for cell in rows[above].cells], rows[above + 1 :]
    headings = _headings(names, rows)
    if headings:
        lines = _listed([rows[i].line for i in sorted(headings)])
        notes.append(f"{lines} left out: rows of headings, not of data")
    rows = [row for i, row in enumerate(rows) if i not in headings]
    cells = [_fitted(row, names, where) for row in rows]
    kept = [i for i, name in enumerate(names) if name]
    for i in (i for i, name in enumerate(names) if not name):
        first = next(((row.line, mine[i]) for row, mine in zip(rows, cells, strict=True) if mine[i].strip()), None)
        content = f"its cells, such as {first[1][:40]!r} in line {first[0]}, are not read" if first else "it is empty"
        notes.append(f"column {i + 1} is left out: it has no name, and {content}")
    if len(kept) < len(names):
        cells = [[mine[i] for i in kept] for mine in cells]
        bare = [not any(cell.strip() for cell in mine) for mine in cells]
        empty = sorted([*empty, *(row.line for row, gone in zip(rows, bare, strict=True) if gone)])
        cells = [mine for mine, gone in zip(cells, bare, strict=True) if not gone]
    if empty:
        notes.append(f"{_listed(empty)} left out: empty")
    return [names[i] for i in kept], cells, notes


def _titles(rows: Sequence[Row]) -> int:
    """The number of title lines: lines with one filled cell, followed by rows with several."""
    wide = next((i for i, row in enumerate(rows[: _MOST_TITLES + 1]) if row.filled > 1), 0)
    if not wide:
        return 0
    names = [cell.strip() for cell in rows[wide].cells if cell.strip()]
    # A table of one column whose second row has a cell too many has no title.
    follow = rows[wide + 1] if wide + 1 < len(rows) else None
    if len(set(names)) < len(names) or any(map(_is_number, names)) or (follow is not None and follow.filled < 2):
        return 0
    return wide


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _headings(names: Sequence[str], rows: Sequence[Row]) -> set[int]:
    """Positions of rows that repeat the column names, or have codes for them."""
    found = set()
    for i, row in enumerate(rows):
        pairs = [(name, cell.strip()) for name, cell in zip(names, row.cells, strict=False) if cell.strip()]
        if len(pairs) > 1 and all(name == cell for name, cell in pairs):
            found.add(i)
    for i, row in enumerate(rows[:2]):
        if all(cell.strip().startswith(_CDE) for cell in row.cells if cell.strip()):
            found |= set(range(i + 1))  # a biotab has other names between names and codes
    return found


def _fitted(row: Row, names: Sequence[str], where: str) -> list[str]:
    """The row with one cell for each name. Empty cells beyond the last name are cut; missing ones are filled."""
    cells, width = row.cells, len(names)
    named = max(i for i, name in enumerate(names) if name) + 1
    if len(cells) < named or any(cell.strip() for cell in cells[width:]):
        raise UserError(
            f"Line {row.line} of {where} has {len(cells)} cells; the header has {width}.",
            "Give the row a cell for each column, and quote cells that hold the separator.",
        )
    return cells[:width] + [""] * (width - len(cells))


def _listed(lines: Sequence[int]) -> str:
    """Lines in words, such as "line 3 is" or "3 rows (lines 4, 5, 6) are"."""
    if len(lines) == 1:
        return f"line {lines[0]} is"
    named = ", ".join(map(str, lines[:_MOST_NAMED])) + (", …" if len(lines) > _MOST_NAMED else "")
    return f"{len(lines)} rows (lines {named}) are"
