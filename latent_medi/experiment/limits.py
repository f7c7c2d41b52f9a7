"""What an experiment will cost, printed before its first stage, and the limits that refuse it."""

from __future__ import annotations

from latent_medi.core.errors import UserError
from latent_medi.experiment.cost_records import ExperimentCost, cost_text, days, listed
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.settings import ExperimentSettings

FREE_IMAGES = 10_000
"""Images of a model that need no max_images, however few real ones there are: they take little time and disk."""


def announce(e: Experiment, cost: ExperimentCost) -> None:
    """Print what is left to do and what it takes, and refuse what the settings do not allow.

    Raises:
        UserError: More images or hours than the settings allow.
    """
    print(cost_text(cost), flush=True)
    check_limits(e.settings, cost)


def check_limits(settings: ExperimentSettings, cost: ExperimentCost) -> None:
    """Refuse more images or hours than the settings allow.

    Raises:
        UserError: Says how many there are, and which settings change it.
    """
    finished = {(row.stage, row.model) for row in cost.stages if row.finished}
    for name, images in cost.planned.items():
        if ("sample", name) in finished:
            continue
        remedy = "Lower seen_per_cell and unseen_per_cell, or plan fewer fields (plan_fields), or a ratio to the real "
        remedy += f"patches: plan='{{goal: own_sites, ratio: 1}}'. If it is meant: max_images={images}."
        if settings.max_images and images > settings.max_images:
            raise UserError(
                f"The plan of {name} asks for {images:,} images, more than max_images={settings.max_images:,}.", remedy
            )
        real = cost.training_patches
        if not settings.max_images and real is not None and images > max(real, FREE_IMAGES):
            raise UserError(f"The plan of {name} asks for {images:,} images, and {real:,} patches are real.", remedy)
    limit = settings.max_hours * 3600
    if limit and cost.seconds > limit:
        more = f", without {listed(cost.not_measured)}" if cost.not_measured else ""
        raise UserError(
            f"The experiment takes {days(cost.seconds)}{more}, more than max_hours={settings.max_hours:g}.",
            "Train or sample fewer images, use a GPU (card=NAME with dry_run=true says what one takes), or raise "
            "max_hours.",
        )
