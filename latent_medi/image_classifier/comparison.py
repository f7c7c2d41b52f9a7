"""Results of a comparison of image classifiers, as a record, a table and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from latent_medi.core.counting import counted
from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed
from latent_medi.core.records import Mismatch, decode
from latent_medi.statistics.confusion import confusion_scores
from latent_medi.statistics.differences import Draws
from latent_medi.statistics.differences import Scored as ScoredRepeats
from latent_medi.statistics.intervals import LEVEL, Estimate, estimate, strata_of
from latent_medi.statistics.left_out import Score
from latent_medi.statistics.seeds import MeanOverSeeds

RESULT_FILE, TABLE_FILE = "classifiers.json", "classifiers.csv"
METRICS = {"accuracy": "accuracy", "f1": "macro F1", "sensitivity": "sensitivity", "specificity": "specificity"}
"""Scores of the comparison by field, in words. All but the accuracy are means over classes."""
Choice = Literal["none", "selected", "random"]


@dataclass(frozen=True)
class ClassifierDifferences:
    """Differences of two kinds of training in each score. Intervals are over test patients and seeds.

    Args:
        accuracy, f1, sensitivity, specificity: As in :class:`ComparedClassifiers`.
        accuracy_of_all: The accuracy with a wider interval, at a level of 1 − 0.05/n for n differences that are
            compared (Bonferroni): that any of the n intervals misses its difference has a probability of at most 5 %.
    """

    accuracy: Estimate
    f1: Estimate
    sensitivity: Estimate
    specificity: Estimate
    accuracy_of_all: Estimate | None = None


@dataclass(frozen=True)
class ComparedClassifiers:
    """Trainings of one kind, one per seed.

    Args:
        training_set: "real", or the synthetic set that is added to the real patches.
        choice: Which synthetic patches: "selected", "random", or "none".
        percent: Synthetic patches per 100 real ones of the same class, as asked for.
        n_real: Real training patches.
        n_synthetic: Synthetic ones; fewer than asked for where the set has too few.
        accuracy: Share of test patches that are right.
        f1, sensitivity, specificity: Means over classes of these rates over test patches.
        minus_real: Differences to the trainings on real patches alone, paired by seed and test patient.
        minus_random: Differences to random patches of the same set and number, paired in the same way.
    """

    training_set: str
    choice: Choice
    percent: float
    n_real: int
    n_synthetic: int
    accuracy: MeanOverSeeds
    f1: MeanOverSeeds
    sensitivity: MeanOverSeeds
    specificity: MeanOverSeeds
    minus_real: ClassifierDifferences | None = None
    minus_random: ClassifierDifferences | None = None


@dataclass(frozen=True)
class ClassifierComparison:
    """A comparison of image classifiers.

    Args:
        network: The network's name in timm.
        field: The field that is classified.
        labels: Its values.
        images: Length of each training in images seen.
        seeds: Trainings of each kind.
        n_patches: Test patches.
        n_patients: Their patients, or what counts as one.
        patient_is: What counts as a patient: "patient", or where patients are not known "slide", "image" or "group".
        rows: The kinds of training; the first is real patches alone.
    """

    network: str
    field: str
    labels: list[str]
    images: int
    seeds: int
    n_patches: int
    n_patients: int
    patient_is: str
    rows: list[ComparedClassifiers]


class TestScores:
    """Scores of several trainings on the same test patches, and without each patient.

    Args:
        truth: Class code of each patch, [N].
        patients: Patient of each, [N].
        n_classes: Number of classes.
    """

    __test__ = False  # no class of tests

    def __init__(self, truth: np.ndarray, patients: np.ndarray, n_classes: int) -> None:
        self.truth, self.n_classes = truth, n_classes
        self.who = np.unique(patients, return_inverse=True)[1].reshape(-1)
        self.n_patients = int(self.who.max()) + 1
        present = np.zeros((n_classes, self.n_patients), bool)
        present[truth, self.who] = True
        there = present[present.any(axis=1)]
        self.strata, self.smallest_class = strata_of(there), int(there.sum(axis=1).min())

    def of(self, found: Sequence[np.ndarray]) -> dict[str, list[Score]]:
        """By score its values, one per training.

        Args:
            found: Predicted codes of each training, [N] each.
        """
        made: dict[str, list[Score]] = {name: [] for name in METRICS}
        for codes in found:
            scores = confusion_scores(self.truth, codes, self.n_classes, self.who)
            for name in METRICS:
                made[name].append(scores.accuracy if name == "accuracy" else scores.macro[name])
        return made

    def differences(
        self, first: Mapping[str, Sequence[Score]], second: Mapping[str, Sequence[Score]], compared: int = 1
    ) -> ClassifierDifferences:
        """First minus second: the mean over seeds of the difference at the same seed, with its interval over test
        patients, each of whom both have classified, and over seeds.

        Args:
            first, second: Scores by name, one per seed.
            compared: Number of differences that a sentence on the accuracy will be about.
        """
        each = {name: self._difference(first[name], second[name]) for name in METRICS}
        level = 1 - (1 - LEVEL) / compared
        return ClassifierDifferences(
            **each, accuracy_of_all=self._difference(first["accuracy"], second["accuracy"], level)
        )

    def _difference(self, first: Sequence[Score], second: Sequence[Score], level: float = LEVEL) -> Estimate:
        by_seed = np.array([a.value - b.value for a, b in zip(first, second, strict=True)])
        left_out = np.stack([a.left_out - b.left_out for a, b in zip(first, second, strict=True)])
        draws = Draws(0.0, [0] * len(by_seed))  # nothing is drawn from a small pool: seeds are all that differs
        scored = ScoredRepeats(draws, by_seed, left_out, self.strata)
        reason = "the noise of the training is unknown: it takes at least two seeds" if len(by_seed) < 2 else None
        n = len(self.truth), self.n_patients
        return estimate(scored.value, *n, scored.spread, None, self.smallest_class, reason, level)


def read_comparison(folder: str | Path) -> ClassifierComparison:
    """The comparison in a folder.

    Raises:
        UserError: There is none, or it is damaged.
    """
    path, remedy = Path(folder) / RESULT_FILE, "Remove it and repeat the command that made it."
    content, _ = read_sealed(path, remedy)
    try:
        return decode(ClassifierComparison, content)
    except Mismatch as error:
        raise UserError(f"{path} is no comparison of classifiers: {error}", remedy) from None


def comparison_table(found: ClassifierComparison) -> pd.DataFrame:
    """A row per kind of training: what was added, then each score's mean and standard error over seeds and, with the
    ends of its interval, its difference to real patches alone."""
    rows = []
    for row in found.rows:
        cells: dict[str, object] = {
            name: getattr(row, name) for name in ("training_set", "choice", "percent", "n_real", "n_synthetic")
        }
        cells["seeds"] = found.seeds
        for name in METRICS:
            score: MeanOverSeeds = getattr(row, name)
            cells |= {f"{name}_mean": score.mean, f"{name}_sem": score.sem}
        for name in METRICS:
            change: Estimate | None = getattr(row.minus_real, name) if row.minus_real else None
            bounds = change.interval if change is not None and isinstance(change.interval, tuple) else (None, None)
            value = change.value if change else None
            cells |= {f"{name}_minus_real": value, f"{name}_low": bounds[0], f"{name}_high": bounds[1]}
        rows.append(cells)
    return pd.DataFrame(rows)


def comparison_facts(found: ClassifierComparison) -> str:
    """What was trained and tested, in a line."""
    unit = "patients" if found.patient_is == "patient" else f"{found.patient_is}s"
    seeds = counted(found.seeds, "seed")
    return (
        f"{found.network}, {found.images:,} images per training, {found.rows[0].n_real:,} real patches, {seeds}; "
        f"{found.n_patches:,} test patches of {found.n_patients:,} {unit}"
    )


def comparison_text(found: ClassifierComparison) -> str:
    """A table per score: a block of rows for each synthetic set, a column for each percentage."""
    real, lines = found.rows[0], [comparison_facts(found)]
    percents = list(dict.fromkeys(row.percent for row in found.rows[1:]))
    sets = list(dict.fromkeys(row.training_set for row in found.rows[1:]))
    choices = list(dict.fromkeys(row.choice for row in found.rows[1:]))
    kinds = {(row.training_set, row.choice, row.percent): row for row in found.rows}
    wide = max(map(len, [*sets, "real patches alone"])) + 10
    for name, words in METRICS.items():
        lines += ["", f"{words}, mean ± SEM over seeds" + (" (difference to real patches alone)" if percents else "")]
        lines.append(f"  {'real patches alone':<{wide}} {_mean(getattr(real, name))}")
        if percents:
            lines.append(f"  {'synthetic patches added':<{wide}} " + "".join(f"{f'{p:g} %':<24}" for p in percents))
        for one in sets:
            for choice in choices:
                cells = (_cell(kinds.get((one, choice, percent)), name) for percent in percents)
                lines.append(f"  {f'{one}, {choice}':<{wide}} " + "".join(f"{cell:<24}" for cell in cells))
    few = [row for row in found.rows[1:] if row.n_synthetic < int(row.percent / 100 * row.n_real) - len(found.labels)]
    lines += [""] if few else []
    lines += [
        f"{row.training_set} has only {row.n_synthetic:,} {row.choice} patches for {row.percent:g} % of {row.n_real:,}."
        for row in few
    ]
    lines += ["", words] if (words := conclusion(found)) else []
    return "\n".join(lines)


def conclusion(found: ClassifierComparison) -> str:
    """Whether synthetic patches helped, in sentences on the accuracy; empty if none were added.

    "Beyond chance" allows for the number of training sets: where none helps, one of many would seem to.
    """
    added = [row.minus_real.accuracy_of_all or row.minus_real.accuracy for row in found.rows if row.minus_real]
    if not added:
        return ""
    n, real = len(added), f"{found.rows[0].accuracy.mean:.3f} with real patches alone"
    higher = sum((change.value or 0.0) > 0 for change in added)
    counted = f"accuracy was higher than the {real} in {higher} of {n} training sets with synthetic patches"
    signs = [_sign(change) for change in added]
    gains, losses = signs.count(1), signs.count(-1)
    if not any(isinstance(change.interval, tuple) for change in added):
        first = f"Not known, since each classifier was trained once: {counted}, but that may be chance."
    elif gains and losses:
        first = f"Some synthetic patches helped and some harmed: {counted}, beyond chance in {gains}, and lower beyond "
        first += f"chance in {losses}."
    elif gains:
        first = f"Synthetic patches helped: {counted}, beyond chance in {gains}."
    elif losses:
        first = f"Synthetic patches harmed: {counted}, and lower beyond chance in {losses}."
    else:
        first = f"It was not shown that synthetic patches help: {counted}, in none beyond chance."
    held, of = published_order(found)
    return (
        f"{first} Selected patches gave more than random ones, and these more than none, in {held} of {of}."
        if of
        else first
    )


def published_order(found: ClassifierComparison) -> tuple[int, int]:
    """In how many of the sets and percentages accuracy rises from real patches alone to random synthetic ones and from
    these to selected ones, as published of HistoDiffusion; and of how many.
    """
    kinds = {(row.training_set, row.choice, row.percent): row.accuracy.mean for row in found.rows}
    real = found.rows[0].accuracy.mean
    pairs = [
        (kinds[name, "random", percent], value)
        for (name, choice, percent), value in kinds.items()
        if choice == "selected" and (name, "random", percent) in kinds
    ]
    return sum(selected > random > real for random, selected in pairs), len(pairs)


def _sign(change: Estimate) -> int:
    """1 and −1 for a difference whose interval lies above and below 0; 0 otherwise, and without an interval."""
    if not isinstance(change.interval, tuple):
        return 0
    low, high = change.interval
    return int(low > 0) - int(high < 0)


def _mean(score: MeanOverSeeds) -> str:
    return f"{score.mean:.3f}" + ("" if score.sem is None else f" ± {score.sem:.3f}")


def _cell(row: ComparedClassifiers | None, name: str) -> str:
    if row is None:
        return "–"
    change: Estimate | None = getattr(row.minus_real, name) if row.minus_real else None
    text = _mean(getattr(row, name))
    if change is None or change.value is None:
        return text
    return f"{text} ({change.value:+.3f}{'*' if _sign(change) else ''})"
