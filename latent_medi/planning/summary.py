"""Summary of a plan: numbers of images, the data before and after, and the text on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from latent_medi.core.counting import counted
from latent_medi.metadata.estimability import VERDICTS

_ROWS, _COLUMNS, _WIDTH = 16, 7, 18  # of the table on the screen; the rows and columns beyond are added up
_DRAWN_FROM = {"cell": "their combination", "class": "their class", "all": "all classes"}


@dataclass
class VerdictCount:
    """Rows and images of a plan with one verdict."""

    rows: int
    images: int


@dataclass
class Budget:
    """The budget of a plan.

    Args:
        images: Images that the settings allow; None for no limit.
        used: Images that are planned.
        gpu_hours: Hours that they take on one GPU; None if its speed is not given.
    """

    images: int | None
    used: int
    gpu_hours: float | None


@dataclass
class BeforeAfter:
    """Real and planned patches by one or two fields.

    Args:
        fields: The fields of rows and columns.
        cells: Per combination the fields' values, ``real`` and ``planned``; combinations with neither are left out.
    """

    fields: list[str]
    cells: list[dict[str, str | int]]


@dataclass
class PlanSummary:
    """Numbers of a plan.

    Args:
        goal: The goal.
        fields: Fields that are combined.
        only: Values that are planned for, by field.
        unit: What is counted in the real data: "patches", or "rows" of a table.
        real: How many there are.
        asked: Images that goal or ratio ask for.
        wanted: Images that the largest number per combination leaves of them.
        images: Images that are planned.
        rows: Rows of the plan.
        empty: Combinations that are wanted and identifiable, and get no image since the total is too small.
        verdicts: Rows and images by verdict.
        forced: Whether unidentifiable combinations are planned.
        budget: The budget.
        drawn: By continuous field, how many rows draw its values from which patients.
        before_after: Real and planned patches.
    """

    goal: str
    fields: list[str]
    only: dict[str, list[str]]
    unit: str
    real: int
    asked: int
    wanted: int
    images: int
    rows: int
    empty: int
    verdicts: dict[str, VerdictCount]
    forced: bool
    budget: Budget
    drawn: dict[str, dict[str, int]]
    before_after: BeforeAfter


@dataclass(frozen=True)
class PlanResult:
    """A plan with its summary.

    Args:
        table: The plan; see :mod:`latent_medi.planning.plan`.
        summary: Its numbers.
        before: Real patches by class and site, the unknown left out.
        after: The same with the planned ones.
    """

    table: pd.DataFrame
    summary: PlanSummary
    before: pd.DataFrame
    after: pd.DataFrame


def count_verdicts(table: pd.DataFrame) -> dict[str, VerdictCount]:
    """Rows and images of a plan by verdict."""
    counts = {word: table.loc[table["verdict"] == word, "count"] for word in VERDICTS}
    return {word: VerdictCount(len(count), int(count.sum())) for word, count in counts.items()}


def count_combinations(index: pd.DataFrame, names: Sequence[str], each: int) -> dict[tuple[str, ...], int]:
    """Real patches by combination of some fields, unknown values included; a row of the index stands for ``each``."""
    sizes = index.groupby(list(names), observed=True).size()
    return {key if isinstance(key, tuple) else (key,): int(size) * each for key, size in sizes.items()}


def before_and_after(
    index: pd.DataFrame, table: pd.DataFrame, domain: Mapping[str, Sequence[str]], site_field: str, each: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Real patches by class and site, without and with the planned ones.

    Args:
        index: Rows of the real data.
        table: The plan.
        domain: Values that are planned for, by combined field.
        site_field: The field of the columns, if it is combined; otherwise the second field is, if there are two.
        each: Patches that a row of the index stands for.
    """
    names = list(domain)
    axes = [names[0], *([name for name in names[1:] if name == site_field] or names[1:2])]

    def frame(counts: pd.Series) -> pd.DataFrame:
        grid = counts.unstack(fill_value=0) if axes[1:] else counts.to_frame("")
        grid = grid.reindex(index=domain[axes[0]], columns=domain[axes[1]] if axes[1:] else [""], fill_value=0)
        return grid.astype(int).rename_axis(index=axes[0], columns=axes[1] if axes[1:] else "")

    before = frame(index.groupby(axes, observed=True).size() * each)
    after = before + frame(table.groupby(axes)["count"].sum()) if len(table) else before
    used = after.columns[after.sum() > 0]
    return before[used], after[used]


def before_after_record(before: pd.DataFrame, after: pd.DataFrame) -> BeforeAfter:
    """The two tables as a record."""
    names = [str(n) for n in (before.index.name, before.columns.name) if n]
    cells: list[dict[str, str | int]] = []
    for row in after.index:
        for column in after.columns:
            real, total = int(before.loc[row, column]), int(after.loc[row, column])
            if total:
                cells.append({**dict(zip(names, (row, column), strict=False)), "real": real, "planned": total - real})
    return BeforeAfter(names, cells)


def plan_text(plan: PlanResult) -> str:
    """At most some 30 lines of at most some 160 characters, however many combinations there are."""
    summary = plan.summary
    of = "; ".join(f"{name}: {_some(values)}" for name, values in summary.only.items())
    share = f" ({summary.images / summary.real:.3g} × real)" if summary.real else ""
    images, rows = counted(summary.images, "image"), counted(summary.rows, "row")
    lines = [
        f"goal {summary.goal} over {' × '.join(summary.fields)}{f' ({of})' if of else ''}",
        f"{summary.real:,} real {summary.unit}, {images} planned{share} in {rows}",
    ]
    lines += _bounds(summary)
    for verdict, count in summary.verdicts.items():
        if count.rows:
            lines.append(f"  {verdict}: {counted(count.rows, 'combination')}, {counted(count.images, 'image')}")
    unidentifiable = summary.verdicts["unidentifiable"].rows
    if unidentifiable and summary.forced:
        lines.append(f"→ {unidentifiable:,} combinations are planned although the data cannot separate their effects.")
    elif unidentifiable:
        lines.append(
            f"→ {unidentifiable:,} combinations are left at 0: the data cannot separate their effects "
            "(force_unidentifiable=true plans them)."
        )
    if summary.empty:
        lines.append(f"→ {summary.empty:,} combinations get no image: the total is too small for all.")
    if not summary.images:
        lines.append("→ Nothing is to be generated.")
    for name, levels in summary.drawn.items():
        if any(levels.values()):
            drawn = [f"{count:,} of {_DRAWN_FROM[level]}" for level, count in levels.items() if count]
            lines.append(f"{name}: rows draw from the patients {', '.join(drawn)}")
    return "\n".join([*lines, "", *_table(plan)])


def _bounds(summary: PlanSummary) -> list[str]:
    lines, budget = [], summary.budget
    if summary.wanted < summary.asked:
        lines.append(f"max_per_cell: {summary.asked:,} images asked for, {summary.wanted:,} fit")
    if budget.images is not None:
        lines.append(f"budget: {budget.used:,} of {budget.images:,} images; {summary.wanted:,} wanted")
    if budget.gpu_hours is not None:
        lines.append(f"time: {budget.gpu_hours:.3g} GPU-hours")
    return lines


def _table(plan: PlanResult) -> list[str]:
    """Real and planned counts of the fullest rows and columns, and the sums of the others."""
    before, after = plan.before, plan.after
    if not after.size:
        return []
    for axis, most in ((0, _ROWS), (1, _COLUMNS)):
        before, after = _folded(before, after, axis, most)
    across = f" × {after.columns.name}" if after.columns.name else ""
    title = f"{after.index.name}{across}: real {plan.summary.unit} + planned images"
    cells = before.map("{:,}".format) + (after - before).map("+{:,}".format)
    cells = cells.rename(index=lambda name: _cut(str(name)), columns=lambda name: _cut(str(name)))
    return [title, *cells.rename_axis(index=None, columns=None).to_string().splitlines()]


def _folded(before: pd.DataFrame, after: pd.DataFrame, axis: int, most: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables with their fullest ``most`` rows (axis 0) or columns (axis 1), and one that sums the others."""
    if after.shape[axis] <= most:
        return before, after
    totals = after.sum(axis=1 - axis).sort_values(ascending=False, kind="stable")
    kept, others = list(totals.index[: most - 1]), list(totals.index[most - 1 :])
    label = f"{len(others)} others"
    result = []
    for table in (before, after):
        if axis:
            table = pd.concat([table[kept], table[others].sum(axis=1).rename(label)], axis=1)
        else:
            table = pd.concat([table.loc[kept], table.loc[others].sum(axis=0).rename(label).to_frame().T])
        result.append(table.rename_axis(index=after.index.name, columns=after.columns.name))
    return result[0], result[1]


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _some(values: list[str], most: int = 4) -> str:
    return ", ".join(values[:most]) + (f" … ({len(values)} in all)" if len(values) > most else "")


def figure_tables(plan: PlanResult) -> dict[str, pd.DataFrame]:
    """Tables by title for :func:`~latent_medi.metadata.heatmap.write_heat_maps`."""
    unit = plan.summary.unit
    return {f"{unit}, before": plan.before, f"{unit}, with the planned images": plan.after}
