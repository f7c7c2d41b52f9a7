"""A difference of two training sets, with its two sources of chance: the test patients, and the samples drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from latent_medi.statistics.intervals import Estimate, Interval

LIKELY_LEVEL = 0.8
"""Level of the interval ``likely``."""


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """A difference and what it rests on. Its intervals hold for other patients and for other samples.

    Args:
        likely: Its 80 % interval; as ``interval`` otherwise.
        error_patients: Standard error over test patients; null where it is not known.
        error_draws: Standard error over the samples drawn, or over training seeds; null where it is not known.
        over: What the difference speaks of: "trained models", whose samples were drawn several times; or "method",
            where models of several training seeds were compared.
        training_seeds: Number of training seeds of the first of the two, 1 or more.
    """

    likely: Interval = None
    error_patients: float | None = None
    error_draws: float | None = None
    over: Literal["trained models", "method"] = "trained models"
    training_seeds: int = 1
