"""CSV logs with a row per interval of images seen, consistent with the checkpoint that a run resumes from; trackers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from latent_medi.core.errors import UserError
from latent_medi.core.files import write_text
from latent_medi.metadata.tables import escape_cell, unescape_cell


def read_log(path: Path) -> list[dict[str, str]]:
    """The complete rows of a log, without a last line that was cut short."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole))
    last = (rows.fieldnames or [""])[-1]
    kept = [row for row in rows if row.get(last)]
    return [{name: unescape_cell(cell) for name, cell in row.items() if isinstance(cell, str)} for row in kept]


class CsvLog:
    """Appends rows to a CSV file whose first column is images seen.

    Args:
        path: The file.
        columns: Names of its columns.
        images: Images seen where the run continues; later rows, of work that was lost, are removed.
    """

    def __init__(self, path: Path, columns: Sequence[str], images: int) -> None:
        self.path = path
        kept = [row for row in read_log(path) if int(row["images"]) <= images]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows({name: escape_cell(cell) for name, cell in row.items()} for row in kept)
        write_text(path, text.getvalue())

    def write(self, rows: Iterable[Sequence[Any]]) -> None:
        """Append rows."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [escape_cell(cell) if isinstance(cell, str) else cell for cell in row] for row in rows
        )
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(text.getvalue())


def start_trackers(accelerator: Accelerator, names: Sequence[str], out: Path, images: int, run: str) -> None:
    """Open TensorBoard or Weights & Biases through Accelerate, in addition to log.csv.

    Args:
        accelerator: Made with these trackers.
        names: "tensorboard", "wandb".
        out: Folder of the run; its name becomes the run's.
        images: Images seen where the run continues; TensorBoard drops later values.
        run: Identifies this run and folder, so that a resumed run continues its own page.

    Raises:
        UserError: A tracker that is not installed or cannot be reached.
    """
    if not names:
        return
    options = {
        "tensorboard": {"purge_step": images + 1},
        "wandb": {"id": run[:16], "name": out.name, "dir": str(out), "resume": "allow"},
    }
    try:
        accelerator.init_trackers(out.name, init_kwargs={name: options[name] for name in names})
        if len(accelerator.trackers) < len(names):  # Accelerate silently leaves out what is not installed
            raise ImportError(f"only {[tracker.name for tracker in accelerator.trackers]} of them are installed")
    except Exception as error:  # each service has its own kinds
        raise UserError(
            f"The trackers {', '.join(names)} cannot be started: {type(error).__name__}: {error}.",
            "pip install 'latent-medi[track]'; for W&B log in, or set WANDB_MODE=offline.",
        ) from None
