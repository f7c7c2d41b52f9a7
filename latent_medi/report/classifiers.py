"""The comparison of image classifiers on the page: HistoDiffusion's table, and whether synthetic patches helped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from latent_medi.image_classifier.comparison import (
    METRICS,
    RESULT_FILE,
    ClassifierComparison,
    ComparedClassifiers,
    comparison_facts,
    conclusion,
    read_comparison,
)
from latent_medi.report.page import DASH, bounds, number
from latent_medi.statistics.seeds import MeanOverSeeds

FOLDER = "image_classifiers"
"""Where an experiment has its comparison, next to the metrics."""


@dataclass(frozen=True)
class ClassifierCell:
    """One score of one training set.

    Args:
        value: Mean and standard error over seeds.
        difference: Its difference to real patches alone, with the interval; empty for these themselves.
    """

    value: str
    difference: str


@dataclass(frozen=True)
class ClassifierTable:
    """One score of every training set.

    Args:
        title: The score in words.
        real: That of real patches alone.
        rows: Synthetic set, choice, and a cell per percentage; ``None`` where there was no such training.
    """

    title: str
    real: ClassifierCell
    rows: list[tuple[str, str, list[ClassifierCell | None]]]


@dataclass(frozen=True)
class PageClassifiers:
    """What the page shows of a comparison.

    Args:
        sentence: Whether synthetic patches helped.
        facts: What was trained and tested, in words.
        percents: Headings of the columns, synthetic patches per 100 real ones.
        tables: A table per score, the accuracy first.
        has_intervals: Whether any difference has an interval.
    """

    sentence: str
    facts: str
    percents: list[str]
    tables: list[ClassifierTable]
    has_intervals: bool


def page_classifiers(folder: Path, wanted: bool) -> PageClassifiers | None:
    """The comparison in a folder, ready to be drawn.

    Args:
        folder: The comparison's.
        wanted: Whether one must be there; otherwise ``None`` if there is none.

    Raises:
        UserError: There is none that is wanted, or it is damaged.
    """
    if not wanted and not (folder / RESULT_FILE).is_file():
        return None
    found = read_comparison(folder)
    percents = list(dict.fromkeys(row.percent for row in found.rows[1:]))
    return PageClassifiers(
        conclusion(found),
        comparison_facts(found),
        [f"{percent:g} %" for percent in percents],
        [_table(found, name, percents) for name in METRICS],
        any(row.minus_real and isinstance(row.minus_real.accuracy.interval, tuple) for row in found.rows),
    )


def _table(found: ClassifierComparison, name: str, percents: list[float]) -> ClassifierTable:
    kinds = {(row.training_set, row.choice, row.percent): row for row in found.rows}
    rows: list[tuple[str, str, list[ClassifierCell | None]]] = [
        (one, choice, [_cell(kinds.get((one, choice, percent)), name) for percent in percents])
        for one, choice in dict.fromkeys((row.training_set, row.choice) for row in found.rows[1:])
    ]
    return ClassifierTable(METRICS[name], _of(found.rows[0], name), rows)


def _cell(row: ComparedClassifiers | None, name: str) -> ClassifierCell | None:
    return None if row is None else _of(row, name)


def _of(row: ComparedClassifiers, name: str) -> ClassifierCell:
    score: MeanOverSeeds = getattr(row, name)
    value = number(score.mean) + ("" if score.sem is None else f" ± {number(score.sem)}")
    if row.minus_real is None:
        return ClassifierCell(value, "")
    change = getattr(row.minus_real, name)
    interval = f" ({bounds(change)})" if isinstance(change.interval, tuple) else ""
    return ClassifierCell(value, DASH if change.value is None else number(change, sign=True) + interval)
