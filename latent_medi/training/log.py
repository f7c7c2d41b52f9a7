"""log.csv: one row per logging interval, consistent with the checkpoint that a run goes on from."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from latent_medi.files import write_text

Measure = tuple[float, float | None]
"""Loss and gradient norm of one update; no norm where fp16's loss scaler skipped the update."""

COLUMNS = ("images", "loss", "lr", "grad_norm", "images_per_s")


def read_log(path: Path) -> list[dict[str, str]]:
    """The complete rows of a log; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if row.get(COLUMNS[-1])]


class TrainingLog:
    """Appends rows to log.csv.

    Args:
        path: The file.
        images: Images seen where the run goes on; later rows, of work that was lost, are removed.
    """

    def __init__(self, path: Path, images: int) -> None:
        self.path = path
        kept = [row for row in read_log(path) if int(row["images"]) <= images]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        write_text(path, text.getvalue())

    def row(self, images: int, window: list[Measure], lr: float, images_per_s: float) -> None:
        """Append a row.

        Args:
            images: Images seen.
            window: (loss, gradient norm) of each update since the last row; their means are written.
            lr: Learning rate of the last update.
            images_per_s: Since the last row or the resume, over all processes.
        """
        loss = sum(entry[0] for entry in window) / len(window)
        norms = [entry[1] for entry in window if entry[1] is not None]
        norm = sum(norms) / len(norms) if norms else float("nan")
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{images},{loss!r},{lr!r},{norm!r},{images_per_s:.1f}\n")
