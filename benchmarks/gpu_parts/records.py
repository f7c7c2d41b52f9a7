"""What is kept of a row: one JSON file, written when it starts, whenever it has a figure, and when it ends."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

RUNNING, PASSED, FAILED, CUT_OFF = "running", "passed", "failed", "cut off"
NEEDS_GPU, NOT_HERE, BELOW_GOAL = "needs a GPU", "not here", "below goal"

FINISHED = (PASSED, NEEDS_GPU, BELOW_GOAL)
"""What need not be run again on the same revision and card. What failed is tried again, and so is what lacked a folder
or a library."""

Record = dict[str, Any]


def revision() -> str:
    """The revision of this source tree: by git, else by the file REVISION, which a packed copy holds."""
    try:
        words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        answer = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
        top = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--show-toplevel"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        if answer.returncode == 0 and Path(top.stdout.strip()).resolve() == ROOT:  # not of a tree around a packed copy
            return answer.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    file = ROOT / "REVISION"
    return file.read_text(encoding="utf-8").strip() if file.is_file() else "unknown"


def file_name(row: str) -> str:
    """A row's name as part of a file's."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", row).strip("-")


def record_file(out: Path, part: str, row: str) -> Path:
    """Where a row's record is."""
    return out / part / f"{file_name(row)}.json"


def plain(value: Any) -> Any:
    """The same for JSON, which has no word for what is not finite, and knows no numbers but Python's."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)
    return number if math.isfinite(number) else repr(number)


def write(path: Path, record: Any) -> None:
    """Write JSON so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(plain(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(out: Path, part: str, row: str) -> Record | None:
    """A row's record, or nothing if there is none that can be read."""
    try:
        record = json.loads(record_file(out, part, row).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) and record.get("row") == row else None


def is_of(record: Record | None, run: Record) -> bool:
    """Whether a record was made at this revision, on this card and in this size."""
    return record is not None and all(record.get(key) == run[key] for key in ("revision", "card", "quick"))


def finished(record: Record | None, run: Record) -> bool:
    """Whether a row need not be run again."""
    return record is not None and is_of(record, run) and record.get("status") in FINISHED


def measured(rows: Iterable[Record]) -> list[Record]:
    """What cards did in training, as :mod:`latent_medi.training.estimate.measured` reads it."""
    found = []
    for row in rows:
        figures = row.get("figures", {})
        if row.get("quick") or row.get("status") not in FINISHED or "peak_bytes" not in figures:
            continue
        found.append(
            {
                "card": row["card"],
                "revision": row["revision"],
                "network": figures["preset"],
                "precision": figures["precision"],
                "compile": figures["compiled"],
                "images_per_second": figures["steps_per_s"] * figures["batch"],
                "peak_gib": figures["peak_bytes"] / 2**30,
            }
        )
    return found


def short(value: Any) -> str:
    """A figure in few letters."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)


def table(records: Iterable[Record]) -> str:
    """Lines of part, row, status, seconds and its main figures."""
    lines = []
    for record in records:
        shown = record.get("note") or ", ".join(f"{k} {short(v)}" for k, v in record.get("shown", {}).items())
        seconds = record.get("seconds")
        lines.append(
            (record["part"], record["row"], record["status"], "" if seconds is None else f"{seconds:.1f}", shown)
        )
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(4)]
    text = []
    for *cells, shown in lines:
        part, row, status, seconds = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
        text.append(f"{part}  {row}  {status}  {seconds.strip():>{widths[3]}} s  {shown[:110]}".rstrip())
    return "\n".join(text)
