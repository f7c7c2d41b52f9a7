"""Images that an import leaves out: a line per reason in the log, and the full list in the dataset or a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from latent_medi.core.errors import UserError
from latent_medi.core.files import write_text
from latent_medi.core.progress import get_logger
from latent_medi.shards.settings import ImportSettings
from latent_medi.shards.writing.records import PROGRESS_FOLDER

logger = get_logger(__name__)

LIST_FILE = "rejected.txt"
_MOST_REASONS, _MOST_NAMES = 10, 3  # in a message


class Rejected(NamedTuple):
    """An image that is left out.

    Args:
        image: Its path as it was given, or the row of the table.
        reason: Why; what is particular to the image comes after the first colon.
        remedy: What to do about it, a sentence; the same for the same reason.
    """

    image: str
    reason: str
    remedy: str = ""


def smaller_than(patch_size: int) -> str:
    """The reason why an image of fewer pixels than a patch is rejected."""
    return f"is smaller than {patch_size} px"


def report_rejected(
    bad: Sequence[Rejected], left_out: Sequence[Rejected], total: int, settings: ImportSettings, out: Path
) -> None:
    """Log why images were rejected, a line per reason; the finished dataset names every one.

    Args:
        bad: Images that cannot become patches.
        left_out: Images that could not be searched for or named; they never stop the others.
        total: Number of images that were read.
        settings: Of the import.
        out: The dataset folder.

    Raises:
        UserError: The bad ones are too many. All are then named in a file, which goes when the dataset is finished.
    """
    every = [*left_out, *bad]
    lines = _lines(every)
    if len(bad) <= settings.max_bad * total:
        for line in lines:
            logger.warning("rejected %s", line)
        return
    path = out / PROGRESS_FOLDER / LIST_FILE
    write_text(path, "".join(f"{entry.image}: {entry.reason}\n" for entry in every))
    hint = f"Repair or remove them, or raise max_bad. All of them: {path}"
    if any(entry.reason.startswith(smaller_than(settings.patch_size)) for entry in bad):
        hint = f"No image is enlarged: set patch_size to the edge of the smallest. {hint}"
    head = f"{len(bad)} of {total} images are bad, more than the share of {settings.max_bad:g} that max_bad allows:"
    raise UserError("\n  ".join([head, *lines]), hint)


def recorded(bad: Sequence[Rejected], left_out: Sequence[Rejected], total: int) -> dict[str, Any]:
    """The entry ``rejected`` of the provenance.

    Returns:
        ``count``, ``images`` with their reasons and, if some could not be searched for, ``left_out``, how many these
        are, and ``of`` how many images.
    """
    images = [{"image": entry.image, "reason": entry.reason} for entry in (*left_out, *bad)]
    entry: dict[str, Any] = {"count": len(images), "images": images}
    return entry | ({"left_out": len(left_out), "of": total + len(left_out)} if left_out else {})


def incomplete(entry: dict[str, Any], max_bad: float) -> str:
    """A message about a finished dataset that lacks more images than ``max_bad`` allows; else ``""``.

    Args:
        entry: From :func:`recorded`.
        max_bad: Largest share, 0 to 1.
    """
    if "of" not in entry or entry["count"] <= max_bad * entry["of"]:
        return ""
    lines = _lines([Rejected(image["image"], image["reason"]) for image in entry["images"]])
    return "\n  ".join([f"{entry['count']} of {entry['of']} images were left out:", *lines])


def _lines(entries: Sequence[Rejected]) -> list[str]:
    by_reason: dict[str, list[Rejected]] = {}
    for entry in entries:
        by_reason.setdefault(entry.reason.partition(": ")[0], []).append(entry)
    ranked = sorted(by_reason.items(), key=lambda item: -len(item[1]))
    lines = [_line(reason, entries) for reason, entries in ranked[:_MOST_REASONS]]
    if rest := sum(len(entries) for _, entries in ranked[_MOST_REASONS:]):
        lines.append(f"{rest} images for other reasons")
    return lines


def _line(reason: str, entries: Sequence[Rejected]) -> str:
    if len(entries) == 1:
        text = f"{entries[0].image}: {entries[0].reason}"
    else:
        details = [entry.reason.removeprefix(reason).removeprefix(": ") for entry in entries[:_MOST_NAMES]]
        names = [f"{e.image} ({d})" if d else e.image for e, d in zip(entries, details, strict=False)]
        text = f"{len(entries)} images, such as {', '.join(names)}: {reason}"
    return f"{text.rstrip('.')}. {entries[0].remedy}" if entries[0].remedy else text
