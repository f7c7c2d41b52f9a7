"""A run can be prolonged: the same command with a larger ``max_images`` continues it, whether it was finished or not.

Order, noise, averages and checkpoints are functions of the images seen and do not depend on the length of the run. Of
the learning rate this depends on the schedule; :func:`explain` says what it means for the result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_medi.core.progress import get_logger
from latent_medi.training.optimizer import learning_rate
from latent_medi.training.settings import TrainSettings

logger = get_logger("training")

LENGTH = frozenset({"settings.max_images", "settings.max_steps"})
"""Entries of a run's record that say how long it is."""


def planned_images(record: Mapping[str, Any]) -> int:
    """Length of a run in images, from what identifies it."""
    settings = record["settings"]
    batch, steps = int(settings["global_batch"]), int(settings["max_steps"])
    return (steps or math.ceil(int(settings["max_images"]) / batch)) * batch


def set_aside(out: Path, products: Sequence[str], images: int) -> None:
    """Rename the results of a finished run that is prolonged, such as ``model`` to ``model-images-000000000640``.

    Args:
        out: Folder of the run.
        products: Possible names of a result.
        images: Images that the results have seen.
    """
    for name in products:
        path, kept = out / name, out / f"{name}-images-{images:012d}"
        # Where one of that length is kept already, the run was cut off while it was prolonged: both are the same.
        if path.exists() and not kept.exists():
            path.rename(kept)
            logger.info("%s is now %s.", path, kept)


def explain(settings: TrainSettings, before: Mapping[str, Any], images: int) -> None:
    """Log what the result of a prolonged run is; nothing if the run has the length that it began with.

    Args:
        settings: The run as it is continued.
        before: What identified the run when its checkpoint was written.
        images: Images seen by then.
    """
    planned, total = planned_images(before), settings.total_images
    if planned >= total:
        return
    old = replace(settings, max_images=planned, max_steps=0)
    ends = f"The run is prolonged from {planned:,} to {total:,} images, at {images:,}."
    if settings.schedule == "cosine":
        logger.warning(
            "%s A cosine cannot be prolonged exactly: the learning rate goes from %.3g to %.3g, and the result is not "
            "that of a run planned for %s images. schedule=constant and inverse_sqrt can.",
            ends,
            learning_rate(images, old),
            learning_rate(images, settings),
            f"{total:,}",
        )
    elif images < settings.total_warmup_images > old.total_warmup_images:
        logger.warning(
            "%s warmup_fraction now counts from the new length, so the learning rate goes from %.3g to %.3g and rises "
            "until %s images. The result is not that of a run planned for that length.",
            ends,
            learning_rate(images, old),
            learning_rate(images, settings),
            f"{math.ceil(settings.total_warmup_images):,}",
        )
    else:
        logger.info(
            "%s The learning rate of schedule=%s does not depend on the length: the result is exactly that of a run "
            "planned for %s images with the same warm-up.",
            ends,
            settings.schedule,
            f"{total:,}",
        )
