"""The verdict: whether a candidate is useful, from its differences to the baselines; none where none is due."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from latent_medi.statistics.differences import Difference
from latent_medi.statistics.intervals import MIN_PATIENTS, Interval

Answer = Literal["useful", "may be useful", "not shown", "not useful", "no verdict"]
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

    answer: Answer
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
        group: Of what a number of patients is needed, in a sentence.
    """

    candidate: str
    score: float | None
    differences: Mapping[str, Difference]
    missing: Sequence[str]
    reasons: Sequence[str]
    group: str = "of each class"


def verdict(evidence: Evidence) -> Verdict:
    """The verdict, or the reasons why there is none."""
    name, differences = evidence.candidate, evidence.differences
    if evidence.score is None or not differences:
        return _none(name, ["there is no downstream comparison with its samples"])
    found = answer(differences.values())
    reasons = [*evidence.reasons]
    if evidence.missing and found != "not useful":
        reasons.append(f"{in_words(evidence.missing)} was not tried")
    if reasons:
        return _none(name, reasons)
    if found == NO_VERDICT:
        unknown = {k: d for k, d in differences.items() if not isinstance(d.interval, tuple)}
        why = {d.reason or f"the interval of its difference from {k} is not estimable" for k, d in unknown.items()}
        return _none(name, sorted(why), more_patients(unknown.values(), evidence.group))
    lead, difference = next(iter(differences.items()))
    numbers = f"accuracy under shift is {evidence.score:.3f}, {difference.value:+.3f} against {lead}"
    numbers += _bounds(difference.interval)
    scope = _scope(difference)
    unsure = {k: d for k, d in differences.items() if not above(d.interval)}
    open_ones = {k: d for k, d in differences.items() if not above(d.likely)}
    against = "" if [*unsure] == [lead] else f" against {in_words([*unsure])}"
    sentences = {
        "useful": f"{name} is useful here {scope}: {numbers}",
        "may be useful": f"{name} may be useful here {scope}, though the evidence does not exclude chance{against}: "
        f"{numbers}",
        "not shown": f"It is not shown that {name} is useful here {scope}, since it is not ahead of "
        f"{in_words([*open_ones], 'or')} beyond chance: {numbers}"
        f"{more_patients(open_ones.values(), evidence.group)}",
        "not useful": f"{name} is not useful here {scope}: {numbers}; {_better(differences)}",
    }
    return Verdict(found, f"{sentences[found]}.", [])


def patients_needed(difference: Difference) -> int:
    """Patients of the smallest class that would be needed to see a true difference of 0.05 with a power of 80 %, at a
    two-sided level of 5 %, from these patients' own variance: max(10, n·((1.96 + 0.84)·SE/0.05)²), SE being the
    standard error over the n patients of the smallest class. 10 where that is not known. The noise of the samples drawn
    is left out: more patients do not lessen it, more samples do.
    """
    error = difference.error_patients
    if error is None or not math.isfinite(error):
        return MIN_PATIENTS
    return max(MIN_PATIENTS, math.ceil(_fewest(difference) * (_REACH * error / TO_SEE) ** 2))


def _fewest(difference: Difference) -> int:
    """Patients of the smallest class."""
    return difference.n_patients if difference.smallest_group is None else difference.smallest_group


def more_patients(differences: Collection[Difference], group: str) -> str:
    """The number of patients that would be needed, or that they are enough, as the last part of a sentence; nothing
    where it is not known.

    It leaves out the draws of samples, of which more can be generated.

    Args:
        differences: Those that the evidence leaves open; the least sure of them decides.
        group: Of what so many are needed, such as "of each class".
    """
    known = [difference for difference in differences if difference.error_patients is not None]
    if not known:
        return ""
    needed, there = max(map(patients_needed, known)), min(map(_fewest, known))
    if needed <= there:
        return f"; the {there} patients {group} are enough to see a difference of {TO_SEE:g}"
    return f"; to see a difference of {TO_SEE:g}, about {needed} patients {group} are needed"


def in_words(names: Sequence[str], last: str = "and") -> str:
    """Names as a list in a sentence; nothing for none."""
    return f" {last} ".join([part for part in (", ".join(names[:-1]), *names[-1:]) if part])


def _none(name: str, reasons: list[str], more: str = "") -> Verdict:
    return Verdict(NO_VERDICT, f"No verdict on {name}: {'; '.join(reasons)}{more}.", reasons)


def _scope(difference: Difference) -> str:
    if difference.over == "method":
        return f"as a method, over {difference.training_seeds} training seeds"
    return "with these trained models"


def _bounds(interval: Interval) -> str:
    if isinstance(interval, tuple):
        return f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
    return f" (interval {interval})" if interval else ""


def _better(differences: Mapping[str, Difference]) -> str:
    """The baselines that do better beyond chance, with the candidate's difference from each."""
    parts = []
    for name, d in differences.items():
        if isinstance(d.likely, tuple) and _below(d.likely):
            parts.append(f"{name} does better ({d.value:+.3f}, 80 % interval {d.likely[0]:+.3f} to {d.likely[1]:+.3f})")
    return in_words(parts)


def answer(differences: Collection[Difference]) -> Answer:
    """What the differences in accuracy under shift, candidate − baseline, say about the candidate.

    A candidate that is no better than one of its baselines is called useful in at most 2.5 % of studies, and useful or
    maybe useful in 10 %, however many baselines there are, since each difference must be above 0 (Berger 1982). One
    that is at least as good as a baseline is called not useful because of that baseline in at most 10 %; baselines that
    are truly as good add up.

    Args:
        differences: One for each baseline without a generator; at least one.

    Returns:
        "useful": every 95 % interval lies above 0. "may be useful": every 80 % interval does. "not useful": the 80 %
        interval against a baseline lies below 0, whatever the others are. "no verdict": else, where an interval is not
        estimable. "not shown": everything else.

    Raises:
        ValueError: There is no difference, or one has no value.
    """
    values = [difference.value for difference in differences]
    if not values or None in values:
        raise ValueError("A verdict needs at least one difference, each with a value.")
    if any(_below(difference.likely) for difference in differences):
        return "not useful"
    if any(not isinstance(difference.interval, tuple) for difference in differences):
        return NO_VERDICT
    if all(above(difference.interval) for difference in differences):
        return "useful"
    return "may be useful" if all(above(difference.likely) for difference in differences) else "not shown"


def above(interval: Interval) -> bool:
    """Whether an interval lies above 0."""
    return isinstance(interval, tuple) and interval[0] > 0


def _below(interval: Interval) -> bool:
    return isinstance(interval, tuple) and interval[1] < 0
