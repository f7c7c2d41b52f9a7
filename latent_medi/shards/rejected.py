"""Images that an import leaves out: a few lines that say why, and a full list where none would be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from latent_medi.errors import UserError
from latent_medi.files import write_text
from latent_medi.progress import get_logger
from latent_medi.shards.records import PROGRESS_FOLDER
from latent_medi.shards.settings import ImportSettings

logger = get_logger(__name__)

LIST_FILE = "rejected.txt"
_MOST_REASONS, _MOST_NAMES = 10, 3  # in a message


def smaller_than(patch_size: int) -> str:
    """The reason why an image of fewer pixels than a patch is rejected."""
    return f"is smaller than {patch_size} px"


def report_rejected(bad: Sequence[Mapping[str, str]], total: int, settings: ImportSettings, out: Path) -> None:
    """Log why images were rejected, a line per reason; all are named in the finished dataset.

    Args:
        bad: ``image`` and ``reason`` of each, what is particular to the image after the first colon of the reason.
        total: Number of images, these included.
        settings: Of the import.
        out: The dataset folder.

    Raises:
        UserError: They are too many. All are then named in a file, which goes when the dataset is finished.
    """
    by_reason: dict[str, list[Mapping[str, str]]] = {}
    for entry in bad:
        by_reason.setdefault(entry["reason"].partition(": ")[0], []).append(entry)
    ranked = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    lines = [_line(reason, entries) for reason, entries in ranked[:_MOST_REASONS]]
    if rest := sum(len(entries) for _, entries in ranked[_MOST_REASONS:]):
        lines.append(f"{rest} images for other reasons")
    if len(bad) <= settings.max_bad * total:
        for line in lines:
            logger.warning("rejected %s", line)
        return
    path = out / PROGRESS_FOLDER / LIST_FILE
    write_text(path, "".join(f"{entry['image']}: {entry['reason']}\n" for entry in bad))
    hint = f"Repair or remove them, or raise max_bad. All of them: {path}"
    if smaller_than(settings.patch_size) in by_reason:
        hint = f"No image is enlarged: set patch_size to the edge of the smallest. {hint}"
    raise UserError(
        f"{len(bad)} of {total} images are bad, more than the share of {settings.max_bad:g} that max_bad allows:"
        + "".join(f"\n  {line}" for line in lines),
        hint,
    )


def _line(reason: str, entries: Sequence[Mapping[str, str]]) -> str:
    if len(entries) == 1:
        return f"{entries[0]['image']}: {entries[0]['reason']}"
    names = []
    for entry in entries[:_MOST_NAMES]:
        detail = entry["reason"].removeprefix(reason).removeprefix(": ")
        names.append(f"{entry['image']} ({detail})" if detail else entry["image"])
    return f"{len(entries)} images, such as {', '.join(names)}: {reason}"
