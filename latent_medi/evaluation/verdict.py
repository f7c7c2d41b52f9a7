"""The verdict: whether a candidate is useful, from its differences to the baselines; none where none is due."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from latent_medi.statistics.differences import Difference
from latent_medi.statistics.intervals import MIN_PATIENTS, NOT_ESTIMABLE, Interval

Answer = Literal["useful", "may be useful", "not shown", "not useful"]
NO_VERDICT: Literal["no verdict"] = "no verdict"
TO_SEE = 0.05
"""Difference in accuracy that the number of patients needed is for."""
_REACH = 1.96 + 0.84
"""Standard errors between no difference and one that a two-sided test at 5 % finds with a power of 80 %."""


@dataclass(frozen=True)
class Verdict:
    """What an evaluation says about the candidate.

    Args:
        answer: "useful", "may be useful", "not shown", "not useful", or "no verdict".
        sentence: The verdict as one sentence.
        reasons: Why there is no verdict; empty if there is one.
    """

    answer: Literal["useful", "may be useful", "not shown", "not useful", "no verdict"]
    sentence: str
    reasons: list[str]


@dataclass(frozen=True)
class Evidence:
    """What a verdict rests on.

    Args:
        candidate: The candidate's name in a sentence.
        score: Its accuracy under shift; null without a comparison.
        differences: Candidate − baseline by the baseline's name in a sentence, all with a value; the first is shown.
        missing: Baselines without which there is no verdict and that were not compared, likewise.
        reasons: Why no verdict is due.
    """

    candidate: str
    score: float | None
    differences: Mapping[str, Difference]
    missing: Sequence[str]
    reasons: Sequence[str]


def verdict(evidence: Evidence) -> Verdict:
    """The verdict, or the reasons why there is none."""
    name, differences = evidence.candidate, evidence.differences
    if evidence.score is None or not differences:
        return _none(name, ["there is no downstream comparison with its samples"])
    found = answer(differences.values())
    reasons = [*evidence.reasons]
    if evidence.missing and found != "not useful":
        reasons.append(f"{in_words(evidence.missing)} was not tried")
    unknown = {d.reason for d in differences.values() if d.interval == NOT_ESTIMABLE and d.reason}
    if found == "not shown" and unknown and not reasons:
        reasons += sorted(unknown)
    if reasons:
        return _none(name, reasons)
    lead, difference = next(iter(differences.items()))
    numbers = f"accuracy under shift is {evidence.score:.3f}, {difference.value:+.3f} against {lead}"
    numbers += _bounds(difference.interval)
    sentences = {
        "useful": f"{name} is useful here {_scope(difference)}: {numbers}",
        "may be useful": f"{name} may be useful here {_scope(difference)}, though the evidence does not exclude chance"
        f"{_against(differences, lead)}: {numbers}",
        "not shown": f"It is not shown that {name} is useful here {_scope(difference)}, since the evidence does not "
        f"exclude chance{_against(differences, lead)}: {numbers}{_more_patients(difference)}",
        "not useful": f"{name} is not useful here {_scope(difference)}: {numbers}; {_at_least_as_good(differences)}",
    }
    return Verdict(found, f"{sentences[found]}.", [])


def patients_needed(difference: Difference) -> int:
    """Patients of the smallest class that would be needed to see a true difference of 0.05 with a power of 80 %, at a
    two-sided level of 5 %, from these patients' own variance: max(10, n·((1.96 + 0.84)·SE/0.05)²), SE being the
    standard error over the n patients of the smallest class. 10 where that is not known.
    """
    n = difference.n_patients if difference.smallest_group is None else difference.smallest_group
    error = difference.error_patients
    if error is None or not math.isfinite(error):
        return MIN_PATIENTS
    return max(MIN_PATIENTS, math.ceil(n * (_REACH * error / TO_SEE) ** 2))


def in_words(names: Sequence[str]) -> str:
    """Names as a list in a sentence; nothing for none."""
    return " and ".join([part for part in (", ".join(names[:-1]), *names[-1:]) if part])


def _none(name: str, reasons: list[str]) -> Verdict:
    return Verdict(NO_VERDICT, f"No verdict on {name}: {'; '.join(reasons)}.", reasons)


def _scope(difference: Difference) -> str:
    if difference.over == "method":
        return f"as a method, over {difference.training_seeds} training seeds"
    return "with these trained models"


def _bounds(interval: Interval) -> str:
    if isinstance(interval, tuple):
        return f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
    return f" (interval {interval})" if interval else ""


def _against(differences: Mapping[str, Difference], lead: str) -> str:
    """The baselines against which the 95 % interval includes 0; nothing where that is the one shown alone."""
    open_ones = [name for name, difference in differences.items() if not _above(difference.interval)]
    return "" if open_ones == [lead] else f" against {in_words(open_ones)}"


def _at_least_as_good(differences: Mapping[str, Difference]) -> str:
    ahead = [name for name, d in differences.items() if d.value is not None and d.value <= 0]
    return f"{in_words(ahead)} {'does' if len(ahead) == 1 else 'do'} at least as well"


def _more_patients(difference: Difference) -> str:
    if difference.error_patients is None:
        return ""
    return f"; to see a difference of {TO_SEE:g}, about {patients_needed(difference)} patients of each class are needed"


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
