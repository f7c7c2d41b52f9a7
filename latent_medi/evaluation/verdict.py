"""The rule of the verdict: whether a candidate is useful, from its differences to the baselines."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from latent_medi.statistics.differences import Difference
from latent_medi.statistics.intervals import Interval

Answer = Literal["useful", "may be useful", "not shown", "not useful"]


def answer(differences: Collection[Difference]) -> Answer:
    """What the differences in accuracy under shift, candidate − baseline, say about the candidate.

    Each must be above 0, so that a candidate that is no better than one of its baselines is called useful in at most
    2.5 % of studies, and at most maybe useful in 10 %, however many baselines there are (Berger 1982).

    Args:
        differences: One for each baseline without a generator; at least one.

    Returns:
        "useful": every 95 % interval lies above 0. "may be useful": every 80 % interval does. "not useful": a baseline
        does at least as well. "not shown": the candidate is ahead of all, but not beyond chance, or nobody can say
        since an interval is not estimable.

    Raises:
        ValueError: There is no difference, or one has no value.
    """
    values = [difference.value for difference in differences]
    if not values or None in values:
        raise ValueError("A verdict needs at least one difference, each with a value.")
    if any(value is not None and value <= 0 for value in values):
        return "not useful"
    if all(_above(difference.interval) for difference in differences):
        return "useful"
    return "may be useful" if all(_above(difference.likely) for difference in differences) else "not shown"


def _above(interval: Interval) -> bool:
    return isinstance(interval, tuple) and interval[0] > 0
