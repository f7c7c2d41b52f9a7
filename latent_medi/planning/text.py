"""A plan on one screen: what was asked for, what is planned, and the data before and after."""

from __future__ import annotations

from typing import Any

import pandas as pd

from latent_medi.planning.planner import Planned

_ROWS, _COLUMNS, _WIDTH = 16, 7, 18  # of the table on the screen; what does not fit is added up
_LEVELS = {"cell": "their combination", "class": "their class", "all": "all classes"}


def plan_text(planned: Planned) -> str:
    """At most some 30 lines of at most some 160 characters, however many combinations there are."""
    facts, real = planned.facts, planned.facts["real"]
    unit, images = facts["unit"], facts["images"]
    of = "; ".join(f"{name}: {_some(values)}" for name, values in facts["only"].items())
    share = f" ({images / real:.3g} × real)" if real else ""
    lines = [
        f"goal {facts['goal']} over {' × '.join(facts['fields'])}{f' ({of})' if of else ''}",
        f"{real:,} real {unit}, {images:,} images planned{share} in {facts['rows']:,} rows",
    ]
    lines += _bounds(facts)
    for verdict, told in facts["verdicts"].items():
        if told["rows"]:
            lines.append(f"  {verdict}: {told['rows']:,} combinations, {told['images']:,} images")
    left_out = facts["verdicts"]["unidentifiable"]["rows"]
    if left_out and facts["forced"]:
        lines.append(f"→ {left_out:,} combinations are planned although the data cannot tell their effects apart.")
    elif left_out:
        lines.append(
            f"→ {left_out:,} combinations are left at 0: the data cannot tell their effects apart "
            "(force_unidentifiable=true plans them)."
        )
    if facts["empty"]:
        lines.append(f"→ {facts['empty']:,} combinations get no image: the total is too small for all.")
    if not images:
        lines.append("→ Nothing is to be generated.")
    for name, levels in facts["drawn"].items():
        told = [f"{count:,} of {_LEVELS[level]}" for level, count in levels.items() if count]
        if told:
            lines.append(f"{name}: rows draw from the patients {', '.join(told)}")
    return "\n".join([*lines, "", *_table(planned, unit)])


def _bounds(facts: dict[str, Any]) -> list[str]:
    lines, budget = [], facts["budget"]
    if facts["wanted"] < facts["asked"]:
        lines.append(f"cap: {facts['asked']:,} images asked for, {facts['wanted']:,} fit")
    if budget["images"] is not None:
        lines.append(f"budget: {budget['used']:,} of {budget['images']:,} images; {facts['wanted']:,} wanted")
    if budget["gpu_hours"] is not None:
        lines.append(f"time: {budget['gpu_hours']:.3g} GPU-hours")
    return lines


def _table(planned: Planned, unit: str) -> list[str]:
    """Real and planned counts, the fullest rows and columns apart and the others added up."""
    before, after = planned.before, planned.after
    if not after.size:
        return []
    for axis, most in ((0, _ROWS), (1, _COLUMNS)):
        before, after = _folded(before, after, axis, most)
    added = after - before
    cells = [[_cut(str(column)) for column in after.columns]]
    cells += [
        [f"{int(before.iat[i, j]):,}+{int(added.iat[i, j]):,}" for j in range(after.shape[1])]
        for i in range(after.shape[0])
    ]
    names = [_cut(f"{after.index.name}"), *(_cut(str(name)) for name in after.index)]
    widths = [max(len(row[j]) for row in cells) for j in range(after.shape[1])]
    first = max(len(name) for name in names)
    across = f" × {planned.after.columns.name}" if planned.after.columns.name else ""
    lines = [f"{planned.after.index.name}{across}: real {unit} + planned images"]
    for name, row in zip(names, cells, strict=True):
        lines.append("  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(row, widths, strict=True))]).rstrip())
    return lines


def _folded(before: pd.DataFrame, after: pd.DataFrame, axis: int, most: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Both tables with their fullest ``most`` rows (axis 0) or columns (axis 1), and one that sums the others."""
    if after.shape[axis] <= most:
        return before, after
    totals = after.sum(axis=1 - axis).sort_values(ascending=False, kind="stable")
    kept, others = list(totals.index[: most - 1]), list(totals.index[most - 1 :])
    label = f"{len(others)} others"
    made = []
    for table in (before, after):
        if axis:
            table = pd.concat([table[kept], table[others].sum(axis=1).rename(label)], axis=1)
        else:
            table = pd.concat([table.loc[kept], table.loc[others].sum(axis=0).rename(label).to_frame().T])
        made.append(table.rename_axis(index=after.index.name, columns=after.columns.name))
    return made[0], made[1]


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…"


def _some(values: list[str], most: int = 4) -> str:
    return ", ".join(values[:most]) + (f" … ({len(values)} in all)" if len(values) > most else "")


def figure_tables(planned: Planned) -> dict[str, pd.DataFrame]:
    """Tables by title for :func:`~latent_medi.metadata.heatmap.write_heat_maps`."""
    unit = planned.facts["unit"]
    return {f"{unit}, before": planned.before, f"{unit}, with the planned images": planned.after}
