"""A plan made from what the data have and lack: a goal, a number, bounds.

The goal says which combinations are wanted and how many images of each; a ratio or a budget may set the total instead,
which is then divided in proportion (:func:`~latent_medi.planning.apportion.apportion`). Combinations that the data
cannot identify get nothing unless forced; a ratio or a budget is divided among the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.metadata.audit import audit
from latent_medi.metadata.cohort import is_table, map_sites, read_cohort
from latent_medi.metadata.estimability import VERDICTS
from latent_medi.metadata.schema import UNKNOWN, Schema
from latent_medi.metadata.tables import read_table
from latent_medi.planning.apportion import Cell, apportion
from latent_medi.planning.checks import (
    EVEN_GOALS,
    LACK_GOALS,
    allowed_images,
    goal_of,
    problems_of,
    problems_with,
    refusal,
)
from latent_medi.planning.continuous_fields import real_values
from latent_medi.planning.plan import MOST, OWN_COLUMNS, REAL, stable_seed, whole_number, write_plan
from latent_medi.planning.settings import PlanSettings
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset

_MOST_CELLS = 200_000


@dataclass(frozen=True)
class Planned:
    """A plan and what there is to say about it.

    Args:
        table: The plan; see :mod:`latent_medi.planning.plan`.
        facts: JSON-able: ``goal``, ``fields``, ``only``, ``unit`` of the real data, ``real`` (how many), ``asked``
            (images that goal or ratio ask for), ``wanted`` (what the cap leaves of them), ``images`` (planned),
            ``rows``, ``empty`` (combinations that are wanted, identifiable and too many for the total), ``verdicts``
            (rows and images by verdict), ``forced``, ``budget`` (``images`` allowed or null, ``used``, ``gpu_hours``
            that the plan takes or null), ``drawn`` (rows by field and level), ``before_after`` (``fields`` of rows and
            columns, and ``cells`` with ``real`` and ``planned``).
        before: Real patches by class and site, the unknown left out.
        after: The same with the planned ones.
    """

    table: pd.DataFrame
    facts: dict[str, Any]
    before: pd.DataFrame
    after: pd.DataFrame


def plan_from(settings: PlanSettings) -> Planned:
    """Make the plan that the settings ask for, and write it.

    Raises:
        UserError: Lists everything that is wrong with the settings; or the data cannot be read.
    """
    problems = []
    if not settings.data:
        problems.append("data is not given: a dataset folder or a table")
    if Path(settings.out).suffix.lower() not in (".csv", ".parquet"):
        problems.append(f"out is {settings.out!r}; it must end in .csv or .parquet")
    if settings.data and not is_table(settings.data):
        problems += [
            f"{name} is for a table; the dataset folder {settings.data} says it itself"
            for name, given in (
                ("continuous", bool(settings.continuous)), ("patches_per_row", settings.patches_per_row != 1)
            )
            if given
        ]  # fmt: skip
    problems += problems_of(settings)
    if not settings.data:
        raise refusal(problems)
    try:
        index, schema = _read(settings)
        problems += problems_with(settings, schema)
    except UserError as error:
        if not problems:
            raise
        problems.append(error.message.rstrip("."))
    if problems:
        raise refusal(problems)
    planned = make_plan(index, schema, settings)
    write_plan(planned.table, settings.out)
    return planned


def _read(settings: PlanSettings) -> tuple[pd.DataFrame, Schema]:
    """The rows that the model has seen, and their schema."""
    if is_table(settings.data):
        site = settings.site_field
        named = [*settings.fields, *settings.only]
        if settings.target:
            named += [name for name in read_table(settings.target).columns if name != "count"]
        taken = (settings.class_field, site, *settings.continuous)
        further = [name for name in dict.fromkeys(named) if name not in taken]
        index, schema = read_cohort(
            settings.data, settings.class_field, site, further, settings.patient_field, settings.slide_field,
            settings.continuous,
        )  # fmt: skip
        if settings.split:
            table, column = read_table(settings.data), SPLIT_PREFIX + settings.split
            if column in table.columns:
                index = index[(table[column] == settings.split_value).to_numpy()]
            elif settings.split != "main":
                names = [c.removeprefix(SPLIT_PREFIX) for c in table.columns if c.startswith(SPLIT_PREFIX)]
                raise UserError(f"{settings.data} has no column {column!r}; {nearest(settings.split, names)}.")
    else:
        dataset = PatchDataset.open(settings.data)
        rows = dataset.rows({SPLIT_PREFIX + settings.split: settings.split_value} if settings.split else None)
        index, schema = dataset.index.iloc[rows], dataset.schema
    if not len(index):
        raise UserError(f"{settings.data} has no row with {settings.split} = {settings.split_value}.")
    if settings.tss_table:
        index, schema, _ = map_sites(index, schema, settings.site_field, settings.tss_table)
    return index, schema


def make_plan(index: pd.DataFrame, schema: Schema, settings: PlanSettings) -> Planned:
    """A plan from the rows a model was (or will be) trained on.

    Args:
        index: Those rows of a dataset's index or of a table.
        schema: Their schema.
        settings: Goal, number and bounds; its data, out, split and what describes a table are not looked at.

    Returns:
        The plan. A row per combination that the goal wants, in the order of the schema's vocabularies; those that the
        data cannot identify are listed with count 0 and their verdict, others without an image are not.

    Raises:
        UserError: Lists everything that is wrong with the settings; or the floor does not fit the budget, the plan is
            too large, or the target cannot be read.
    """
    if problems := problems_of(settings) + problems_with(settings, schema):
        raise refusal(problems)
    if taken := [name for name in schema.names if name in OWN_COLUMNS]:
        raise UserError(
            f"A field called {taken[0]!r} cannot be planned: a plan has such a column itself.",
            "Rename the column in the table, and import it again.",
        )
    goal = goal_of(settings)
    target = _read_target(settings.target, schema) if settings.target else None
    names = list(target[0]) if target else _combined(settings, schema)
    domain = {name: _chosen(schema, name, settings) for name in names}
    if (size := math.prod(len(values) for values in domain.values())) > _MOST_CELLS:
        raise UserError(
            f"{' × '.join(names)} has {size} combinations; the most is {_MOST_CELLS}.", "Choose fewer fields, or only=…"
        )
    chosen = pd.Series(True, index=index.index)
    for name, values in settings.only.items():
        chosen &= index[name].isin(values)
    real = int(chosen.sum()) * settings.patches_per_row
    there = _count(index[chosen], names, settings.patches_per_row)
    cells = list(product(*domain.values())) if target is None else list(target[1])
    # "" and "unknown" are no values: such patches count for no combination.
    seen = {cell: there[cell] for cell in cells if cell in there}
    wants = _lacks(target[1], seen) if target else _wants(goal, cells, seen, settings)
    # A ratio may ask for more than what is lacking, and then all combinations that the goal evens out get some.
    sites = {cell[1:] for cell in seen} if goal == "within_site" else None
    more = bool(settings.ratio) and goal in LACK_GOALS
    reach = [c for c in cells if c in wants or (more and (sites is None or c[1:] in sites))]
    requested = [dict(zip(names, cell, strict=True)) for cell in reach]
    found = audit(index, schema, requested, settings.thin_patients, site_field=settings.site_field)["verdicts"]
    verdicts = {cell: entry["verdict"] for cell, entry in zip(reach, found, strict=True)}
    free = [c for c in reach if settings.force_unidentifiable or verdicts[c] != "unidentifiable"]
    counts, bounds = _counts(goal, wants, free, real, settings)
    rows = []
    for cell in reach:
        left_out = cell in wants and verdicts[cell] == "unidentifiable" and not settings.force_unidentifiable
        if not counts.get(cell) and not left_out:
            continue
        told = dict(zip(names, cell, strict=True))
        row = {f.name: told.get(f.name, REAL if f.continuous else "") for f in schema.fields}
        seed = stable_seed(settings.seed, *told.items())
        rows.append({**row, "count": counts.get(cell, 0), "verdict": verdicts[cell], "seed": seed})
    table = pd.DataFrame(rows, columns=[*schema.names, *OWN_COLUMNS])
    drawn: dict[str, dict[str, int]] = {}
    if settings.draw_from == "cell":
        columns, drawn = real_values(index, schema, table, names, settings.thin_patients)
        table = table.assign(**columns)
    axes = _axes(names, settings.site_field)
    before, after = _before_after(index[chosen], table, domain, axes, settings.patches_per_row)
    images = int(table["count"].sum())
    hours = images / settings.images_per_s / 3600 if settings.images_per_s else None
    facts = {
        "goal": goal,
        "fields": names,
        "only": {name: list(values) for name, values in settings.only.items()},
        "unit": "rows" if is_table(settings.data) and settings.patches_per_row == 1 else "patches",
        "real": real,
        **bounds,
        "images": images,
        "rows": len(table),
        "empty": sum(1 for cell in free if cell in wants and not counts.get(cell)),
        "verdicts": {
            word: {
                "rows": int((table["verdict"] == word).sum()),
                "images": int(table.loc[table["verdict"] == word, "count"].sum()),
            }
            for word in VERDICTS
        },
        "forced": settings.force_unidentifiable,
        "budget": {**bounds["budget"], "used": images, "gpu_hours": hours},
        "drawn": drawn,
        "before_after": {"fields": axes, "cells": _records(before, after)},
    }
    return Planned(table, facts, before, after)


def _counts(
    goal: str, wants: Mapping[Cell, int], free: Sequence[Cell], real: int, settings: PlanSettings
) -> tuple[dict[Cell, int], dict[str, Any]]:
    """Images by cell; ``wanted`` and ``budget`` for the facts."""
    low, high = settings.floor, settings.cap or None
    weights = {cell: wants[cell] for cell in free if cell in wants}
    allowed = allowed_images(settings)
    if settings.ratio:
        wanted = int(Decimal(repr(float(settings.ratio))) * real)  # binary 0.29 × 100 would be 28
        if goal in LACK_GOALS and wanted > (lacking := sum(weights.values())):
            # Everything reaches its level; the rest lifts all levels alike.
            rest = apportion(dict.fromkeys(free, 1), wanted - lacking) if free else {}
            weights = {cell: weights.get(cell, 0) + rest[cell] for cell in free}
            weights = {cell: weight for cell, weight in weights.items() if weight}
    elif goal in EVEN_GOALS and not settings.per_cell:
        assert allowed is not None  # the settings were checked
        wanted = allowed
    else:
        weights = {c: min(max(w, low), high or MOST) for c, w in weights.items()}
        wanted = sum(weights.values())
    asked = wanted
    if high is not None:
        wanted = min(wanted, high * len(weights))
    total = (wanted if allowed is None else min(wanted, allowed)) if weights else 0
    if total >= MOST:
        raise UserError(f"The plan asks for {total} images; the most is {MOST - 1}.", "Lower the number, or set cap.")
    if total < low * len(weights):
        raise UserError(
            f"floor = {low} for {len(weights)} combinations is {low * len(weights)} images, and {total} are to be "
            "planned.",
            "Lower floor, raise the budget or the ratio, or plan fewer combinations with only=… or fields=….",
        )
    facts = {"asked": asked, "wanted": wanted if weights else 0, "budget": {"images": allowed}}
    return apportion(weights, total, low, high), facts


def _wants(goal: str, cells: Sequence[Cell], seen: Mapping[Cell, int], settings: PlanSettings) -> dict[Cell, int]:
    """Images that a goal wants by cell, above 0; the class is the first value of a cell."""
    each = settings.per_cell or 1
    if goal == "fill_unseen":
        return {cell: each for cell in cells if cell not in seen}
    if goal == "union":
        sites = {cell[1:] for cell in seen}
        return {cell: each for cell in cells if cell[1:] in sites}
    if goal == "separate":
        return {cell: seen[cell] if settings.spread == "real" else each for cell in cells if cell in seen}
    if goal == "balance":
        level = settings.per_cell or max(seen.values(), default=0)
        return _lacks(dict.fromkeys(cells, level), seen)
    if goal == "within_site":
        largest: dict[Cell, int] = {}
        for cell, number in seen.items():
            largest[cell[1:]] = max(number, largest.get(cell[1:], 0))
        return _lacks({cell: largest.get(cell[1:], 0) for cell in cells}, seen)
    return dict.fromkeys(cells, each)


def _lacks(levels: Mapping[Cell, int], seen: Mapping[Cell, int]) -> dict[Cell, int]:
    return {cell: level - seen.get(cell, 0) for cell, level in levels.items() if level > seen.get(cell, 0)}


def _read_target(path: str, schema: Schema) -> tuple[tuple[str, ...], dict[Cell, int]]:
    """The fields of a target table in the schema's order, and the number to reach by combination."""
    table, where = read_table(path), f"The target {path}"
    columns = [str(c) for c in table.columns]
    if "count" not in columns:
        raise UserError(f"{where} has no column 'count'; {nearest('count', columns)}.")
    for name in columns:
        if name == "count":
            continue
        if name not in schema.names:
            raise UserError(f"{where} has the column {name!r}, no field of the data; {nearest(name, schema.names)}.")
        if schema.field(name).continuous:
            raise UserError(f"{where} has the continuous field {name!r}; it counts classes and categories.")
    names = tuple(f.name for f in schema.fields if f.name in columns)
    if not names or not len(table):
        raise UserError(f"{where} has no {'row' if names else 'column of a field'}.", "class,site,count")
    levels: dict[Cell, int] = {}
    first: dict[Cell, int] = {}
    for i, row in enumerate(table.to_dict("records"), 1):
        cell = tuple(row[name] for name in names)
        for name, value in zip(names, cell, strict=True):
            try:
                known = schema.field(name).code(value) != UNKNOWN
            except UserError as error:
                raise UserError(f"{where}, row {i}: {error.message}", error.hint) from None
            if not known:
                raise UserError(f"{where}, row {i}: {name} is {value!r}; a number is reached for a known value.")
        levels[cell] = whole_number(row["count"], MOST, f"{where}, row {i}: count")
        if first.setdefault(cell, i) != i:
            raise UserError(f"{where}: rows {first[cell]} and {i} are of the same combination, {' × '.join(cell)}.")
    return names, levels


def _combined(settings: PlanSettings, schema: Schema) -> list[str]:
    return [f.name for f in schema.fields if (f.name in settings.fields if settings.fields else not f.continuous)]


def _chosen(schema: Schema, name: str, settings: PlanSettings) -> list[str]:
    """A field's values that are planned for, in the order of its vocabulary."""
    return [value for value in schema.field(name).values if value in settings.only.get(name, [value])]


def _count(index: pd.DataFrame, names: Sequence[str], each: int) -> dict[Cell, int]:
    """Real patches by combination, of whatever words the cells hold."""
    sizes = index.groupby(list(names), observed=True).size()
    return {key if isinstance(key, tuple) else (key,): int(size) * each for key, size in sizes.items()}


def _axes(names: Sequence[str], site_field: str) -> list[str]:
    """Rows and, if two fields are combined, columns of the summary: class and site if they are among them."""
    further = [name for name in names[1:] if name == site_field] or list(names[1:2])
    return [names[0], *further]


def _before_after(
    index: pd.DataFrame, table: pd.DataFrame, domain: Mapping[str, Sequence[str]], axes: Sequence[str], each: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Real patches by the axes, without and with the planned ones; columns without any are left out."""
    there = _count(index, axes, each)
    planned = table.groupby(list(axes))["count"].sum() if len(table) else {}
    rows, columns = domain[axes[0]], domain[axes[1]] if len(axes) > 1 else [""]

    def frame(counts: Mapping[Any, int]) -> pd.DataFrame:
        cells = [[int(counts.get((r, c) if len(axes) > 1 else r, 0)) for c in columns] for r in rows]
        made = pd.DataFrame(cells, index=list(rows), columns=list(columns))
        return made.rename_axis(index=axes[0], columns=axes[1] if len(axes) > 1 else "")

    before = frame(there if len(axes) > 1 else {key[0]: number for key, number in there.items()})
    after = before + frame(planned)
    used = after.columns[after.sum() > 0]
    return before[used], after[used]


def _records(before: pd.DataFrame, after: pd.DataFrame) -> list[dict[str, Any]]:
    names = [str(n) for n in (before.index.name, before.columns.name) if n]
    return [
        {**dict(zip(names, (row, column), strict=False)), "real": int(before.loc[row, column]),
         "planned": int(after.loc[row, column] - before.loc[row, column])}
        for row in after.index
        for column in after.columns
        if after.loc[row, column]
    ]  # fmt: skip
