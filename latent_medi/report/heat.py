"""Heat maps of the page: training patches by class and site, and requested against found values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from latent_medi.evaluation.adherence.records import FieldRecovery
from latent_medi.evaluation.cohort.comparison_sets import REAL
from latent_medi.evaluation.downstream.registry import label_of
from latent_medi.evaluation.results import Metrics
from latent_medi.metadata.settings import AuditSettings
from latent_medi.report.page import percent, shade

THIN = AuditSettings.thin_patients
"""A combination of fewer patients is thin."""
_MOST_ACROSS = 12  # sites that fit next to each other
_MOST_MATRIX = 16  # values of a field whose matrix fits a desk's screen
_MOST_NARROW = 6  # values of a field whose matrix fits a telephone


@dataclass(frozen=True)
class TrainingCell:
    """Training patches of one class at one site.

    Args:
        column: The cell's column.
        patches, patients: How many.
        colour: Background.
        light: Whether the text is light.
        mark: "held" for a held-out combination, "thin" for one of few patients, "none" for one without a patch.
    """

    column: str
    patches: int
    patients: int
    colour: str
    light: bool
    mark: Literal["held", "thin", "none", ""]


@dataclass(frozen=True)
class TrainingTable:
    """Training patches by class and site.

    Args:
        columns: Headings: the sites, or the classes where there are many sites.
        rows: Name and cells.
        long: Whether rows are sites, those with a held-out combination first.
        none_shown: Whether training has no patch of the held-out combinations.
        thin: Patients below which a combination is thin.
        other: Held-out combinations of other fields.
    """

    columns: list[str]
    rows: list[tuple[str, list[TrainingCell]]]
    long: bool
    none_shown: bool
    thin: int
    other: list[str]


@dataclass(frozen=True)
class FoundValue:
    """What is found where one value was requested.

    Args:
        value: The requested value.
        shares: Share in which it is found, of each set of patches.
        instead: The value found most often instead, with its share, likewise; empty where there is none.
    """

    value: str
    shares: list[str]
    instead: list[str]


@dataclass(frozen=True)
class Matrix:
    """Requested and found values of a field.

    Args:
        field: The field.
        values: Its values.
        panels: Title and shares of each set of patches, real test patches last; empty where they do not fit.
        titles: Of each set of patches.
        listed: The same as a list, by value; empty where the panels fit every screen.
    """

    field: str
    values: list[str]
    panels: list[tuple[str, list[list[float | None]]]]
    titles: list[str]
    listed: list[FoundValue]


def training_table(metrics: Metrics) -> TrainingTable | None:
    """Training counts by class and site, ready to be drawn; ``None`` if the split has no training patches."""
    info, split = metrics.dataset, metrics.settings.train_value
    if split not in info.counts.patches:
        return None
    held = [c for c in info.held_out if set(c) == {info.class_field, info.site_field}]
    pairs = {(c[info.class_field], c[info.site_field]) for c in held}
    patches, patients = info.counts.patches[split], info.counts.patients[split]
    most = max((n for row in patches for n in row), default=0) or 1

    def cell(i: int, j: int, column: str) -> TrainingCell:
        found, of = patches[i][j], patients[i][j]
        level = (found / most) ** 0.5  # so that a rare cell differs from an empty one
        mark: Literal["held", "thin", "none", ""] = "thin" if of < THIN else ""
        if (info.classes[i], info.sites[j]) in pairs:
            mark = "held"
        elif not found:
            mark = "none"
        return TrainingCell(column, found, of, shade(level), level > 0.55, mark)

    classes, sites = range(len(info.classes)), range(len(info.sites))
    long = len(info.sites) > _MOST_ACROSS
    if long:
        concerned = {site for _, site in pairs}
        order = sorted(sites, key=lambda j: (info.sites[j] not in concerned, -sum(row[j] for row in patches)))
        rows = [(info.sites[j], [cell(i, j, info.classes[i]) for i in classes]) for j in order]
    else:
        rows = [(info.classes[i], [cell(i, j, info.sites[j]) for j in sites]) for i in classes]
    return TrainingTable(
        columns=info.classes if long else info.sites,
        rows=rows,
        long=long,
        none_shown=not any(c.patches for _, cells in rows for c in cells if c.mark == "held"),
        thin=THIN,
        other=[" × ".join(c.values()) for c in info.held_out if c not in held],
    )


def matrix(field: str, recovery: FieldRecovery) -> Matrix:
    """Requested and found values of a field, by synthetic set and for real patches."""
    shares = {label_of(n): rows for n, rows in recovery.confusion.items() if n != REAL}
    titles = [f"{name}, all samples" for name in shares]
    if shares:
        shares["real patches"] = recovery.confusion[REAL]
        titles.append("real test patches, all combinations")
    values = recovery.values
    return Matrix(
        field=field,
        values=values,
        panels=list(zip(titles, shares.values(), strict=True)) if len(values) <= _MOST_MATRIX else [],
        titles=list(shares),
        listed=_listed(values, shares) if len(values) > _MOST_NARROW and shares else [],
    )


def _listed(values: Sequence[str], shares: Mapping[str, Sequence[Sequence[float | None]]]) -> list[FoundValue]:
    """Each value, that which the first set shows least first."""
    found = []
    for i, value in enumerate(values):
        rows = [[share or 0.0 for share in table[i]] for table in shares.values()]
        known = [table[i][i] is not None for table in shares.values()]
        others = [max((share, j) for j, share in enumerate(row) if j != i) for row in rows]
        found.append(
            FoundValue(
                value,
                [percent(row[i]) if there else percent(None) for row, there in zip(rows, known, strict=True)],
                [f"{values[j]} {percent(share)}" if share else "" for share, j in others],
            )
        )
    first = next(iter(shares.values()))
    order = sorted(range(len(values)), key=lambda i: (first[i][i] is None, first[i][i] or 0.0))
    return [found[i] for i in order]
