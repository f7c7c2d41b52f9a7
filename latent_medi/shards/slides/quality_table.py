"""The quality table of slides that were cut: a row per slide, and summaries of its reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.metadata.tables import read_table, require_columns, write_for_people, written_for_people

QC_FOLDER = "qc"
QC_TABLE = "qc/slides.csv"
QC_COLUMNS = (
    *("slide", "status", "reason", "kept", "candidates"),
    *("rejected_tissue", "rejected_white", "rejected_black", "rejected_blur", "rejected_unreadable"),
    *("mpp_x", "mpp_y", "mpp_from", "level", "downsample", "width", "height", "icc_profile"),
    *("bytes", "seconds", "path"),
)


def read_quality(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a quality table by slide; none if there is no table."""
    if not path.is_file():
        return {}
    table = written_for_people(read_table(path))
    require_columns(table, ["slide", "status"], f"The quality table {path}")
    return {row["slide"]: row for row in table.to_dict(orient="records")}


def bad_rows(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of slides that are left out."""
    return [row for row in rows if row["status"] not in ("kept", "estimated")]


def reasons_by_slide(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The reason by slide that is left out."""
    return {row["slide"]: row["reason"] for row in bad_rows(rows)}


def count_by_reason(rows: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How many slides each kind of reason (the text before the colon) left out, most frequent first."""
    kinds = Counter(f"{row['status']}: {row['reason'].partition(':')[0]}" for row in bad_rows(rows))
    return dict(kinds.most_common())


def reasons_text(rows: list[dict[str, Any]], most: int = 20) -> str:
    """The slides that are left out, in lines: counts by reason if some share one, then the first ``most`` slides."""
    bad, kinds = bad_rows(rows), count_by_reason(rows)
    lines = [f"{count} × {kind}" for kind, count in kinds.items()] if len(kinds) < len(bad) else []
    lines += [f"{row['path']}: {row['status']}: {row['reason']}" for row in bad[:most]]
    return "\n  ".join(lines + ([f"… and {len(bad) - most} more"] if len(bad) > most else []))


def write_quality(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the table, with :data:`QC_COLUMNS` of each row."""
    write_for_people(pd.DataFrame([{column: row.get(column, "") for column in QC_COLUMNS} for row in rows]), path)
