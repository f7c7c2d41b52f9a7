"""Make a plan from what the data have and lack: a goal, a number, bounds.

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

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.metadata.audit import audit
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.table_index import is_table
from latent_medi.planning.apportion import Combination, apportion
from latent_medi.planning.checks import (
    EVEN_GOALS,
    LACK_GOALS,
    allowed_images,
    combined_names,
    goal_of,
    plans_unidentifiable,
    problems_of,
    problems_with,
    refusal,
)
from latent_medi.planning.continuous_fields import real_values
from latent_medi.planning.inputs import read_rows, read_target
from latent_medi.planning.plan import MOST, OWN_COLUMNS, REAL, stable_seed, write_plan
from latent_medi.planning.settings import PlanSettings
from latent_medi.planning.summary import (
    Budget,
    PlanResult,
    PlanSummary,
    before_after_record,
    before_and_after,
    count_combinations,
    count_verdicts,
)

_MOST_COMBINATIONS = 200_000


def plan_from(settings: PlanSettings) -> PlanResult:
    """Make the plan that the settings ask for, and write it.

    Raises:
        UserError: Lists every problem of the settings; or the data cannot be read.
    """
    problems = []
    if not settings.data:
        problems.append("data is not given: a dataset folder or a table")
    if Path(settings.out).suffix.lower() not in (".csv", ".parquet"):
        problems.append(f"out is {settings.out!r}; it must end in .csv or .parquet")
    if settings.data and not is_table(settings.data):
        of_table = {"continuous": bool(settings.continuous), "patches_per_row": settings.patches_per_row != 1}
        problems += [
            f"{name} is for a table, and {settings.data} is a dataset" for name, set_ in of_table.items() if set_
        ]
    problems += problems_of(settings)
    if not settings.data:
        raise refusal(problems)
    try:
        index, schema = read_rows(settings)
        problems += problems_with(settings, schema)
    except UserError as error:
        if not problems:
            raise
        problems.append(error.message.rstrip("."))
    if problems:
        raise refusal(problems)
    plan = make_plan(index, schema, settings)
    write_plan(plan.table, settings.out)
    return plan


@dataclass(frozen=True)
class _Wanted:
    """What a goal wants of some data.

    Args:
        images: Images by combination, above 0.
        within_reach: Combinations that may get images, in the order of the vocabularies: those, and with a ratio that
            asks for more than is lacking also the others that the goal evens out.
    """

    images: dict[Combination, int]
    within_reach: list[Combination]


def make_plan(index: pd.DataFrame, schema: Schema, settings: PlanSettings) -> PlanResult:
    """A plan from the rows that a model was (or will be) trained on.

    Args:
        index: Those rows of a dataset's index or of a table.
        schema: Their schema.
        settings: Goal, number and bounds. Data, out, split and what describes a table are ignored.

    Returns:
        The plan. A row per combination that the goal wants, in the order of the schema's vocabularies; those that the
        data cannot identify are listed with count 0 and their verdict, others without an image are not.

    Raises:
        UserError: Lists every problem of the settings; or min_per_cell does not fit the budget, the plan is too large,
            or the target cannot be read.
    """
    if problems := problems_of(settings) + problems_with(settings, schema):
        raise refusal(problems)
    if taken := [name for name in schema.names if name in OWN_COLUMNS]:
        raise UserError(
            f"A field called {taken[0]!r} cannot be planned: a plan has such a column itself.",
            "Rename the column in the table, and import it again.",
        )
    names, target = _fields_and_target(settings, schema)
    domain = {n: [v for v in schema.field(n).values if v in settings.only.get(n, [v])] for n in names}
    if (size := math.prod(map(len, domain.values()))) > _MOST_COMBINATIONS:
        raise UserError(
            f"{' × '.join(names)} has {size} combinations; the most is {_MOST_COMBINATIONS}.",
            "Choose fewer fields, or only=…",
        )
    selected = index
    for name, values in settings.only.items():
        selected = selected[selected[name].isin(values)]
    real, each = len(selected) * settings.patches_per_row, settings.patches_per_row
    wanted = _wanted(list(product(*domain.values())), target, count_combinations(selected, names, each), settings)
    requested = [dict(zip(names, c, strict=True)) for c in wanted.within_reach]
    found = audit(index, schema, requested, settings.thin_patients, site_field=settings.site_field)["verdicts"]
    verdicts = {c: entry["verdict"] for c, entry in zip(wanted.within_reach, found, strict=True)}
    forced = plans_unidentifiable(settings)
    free = [c for c in wanted.within_reach if forced or verdicts[c] != "unidentifiable"]
    asked, limited, weights = _weights(wanted.images, free, real, settings)
    counts = _divide(weights, limited, settings)
    table = _table(names, schema, wanted, verdicts, counts, settings)
    drawn: dict[str, dict[str, int]] = {}
    if settings.draw_from == "cell":
        columns, drawn = real_values(index, schema, table, names, settings.thin_patients)
        table = table.assign(**columns)
    before, after = before_and_after(selected, table, domain, settings.site_field, each)
    images = int(table["count"].sum())
    hours = images / settings.images_per_s / 3600 if settings.images_per_s else None
    summary = PlanSummary(
        goal=goal_of(settings),
        fields=names,
        only={name: list(values) for name, values in settings.only.items()},
        unit="rows" if is_table(settings.data) and each == 1 else "patches",
        real=real,
        asked=asked,
        wanted=limited,
        images=images,
        rows=len(table),
        empty=sum(1 for c in free if c in wanted.images and not counts.get(c)),
        verdicts=count_verdicts(table),
        forced=forced,
        budget=Budget(allowed_images(settings), images, hours),
        drawn=drawn,
        before_after=before_after_record(before, after),
    )
    return PlanResult(table, summary, before, after)


def _fields_and_target(settings: PlanSettings, schema: Schema) -> tuple[list[str], dict[Combination, int] | None]:
    """Fields that are combined, and the numbers to reach if there is a target table."""
    if settings.target:
        return read_target(settings.target, schema)
    return combined_names(settings, schema), None


def _wanted(
    combinations: list[Combination],
    target: Mapping[Combination, int] | None,
    counts: Mapping[Combination, int],
    settings: PlanSettings,
) -> _Wanted:
    """What the goal wants.

    Args:
        combinations: All of them.
        target: Numbers to reach, if there is a target table; it names the combinations then.
        counts: Real patches by combination.
        settings: Goal and number.
    """
    goal = goal_of(settings)
    if target is not None:
        combinations = list(target)
    # "" and "unknown" are no values: such patches count for no combination.
    seen = {c: counts[c] for c in combinations if c in counts}
    images = _lacks(target, seen) if target is not None else _images(goal, combinations, seen, settings)
    others: set[Combination] = set()
    if settings.ratio and goal in LACK_GOALS:
        sites = {c[1:] for c in seen}
        others = {c for c in combinations if goal != "within_site" or c[1:] in sites}
    return _Wanted(images, [c for c in combinations if c in images or c in others])


def _images(
    goal: str, combinations: Sequence[Combination], seen: Mapping[Combination, int], settings: PlanSettings
) -> dict[Combination, int]:
    """Images that a goal wants by combination, above 0; the class is the first value of a combination."""
    each = settings.per_cell or 1
    if goal == "fill_unseen":
        return {c: each for c in combinations if c not in seen}
    if goal == "all_sites_of_classes":
        sites = {c[1:] for c in seen}
        return {c: each for c in combinations if c[1:] in sites}
    if goal == "own_sites":
        return {c: seen[c] if settings.spread == "real" else each for c in combinations if c in seen}
    if goal == "tasks":
        return _for_tasks(combinations, seen, settings.tasks)
    if goal == "balance":
        level = settings.per_cell or max(seen.values(), default=0)
        return _lacks(dict.fromkeys(combinations, level), seen)
    if goal == "within_site":
        largest: dict[Combination, int] = {}
        for c, number in seen.items():
            largest[c[1:]] = max(number, largest.get(c[1:], 0))
        return _lacks({c: largest.get(c[1:], 0) for c in combinations}, seen)
    return dict.fromkeys(combinations, each)


def _for_tasks(
    combinations: Sequence[Combination], seen: Mapping[Combination, int], tasks: Mapping[str, Sequence[str]]
) -> dict[Combination, int]:
    """Every seen combination as often as it was, and each class of a task at the sites of its other classes.

    There it is wanted as often as the other classes have patches at the site; of several tasks the largest number
    holds.
    """
    wanted = dict(seen)
    for classes in tasks.values():
        at_site: dict[Combination, int] = {}
        for c, number in seen.items():
            if c[0] in classes:
                at_site[c[1:]] = at_site.get(c[1:], 0) + number
        for c in combinations:
            if c[0] in classes and c not in seen and c[1:] in at_site:
                wanted[c] = max(at_site[c[1:]], wanted.get(c, 0))
    return wanted


def _lacks(levels: Mapping[Combination, int], seen: Mapping[Combination, int]) -> dict[Combination, int]:
    return {c: level - seen.get(c, 0) for c, level in levels.items() if level > seen.get(c, 0)}


def _weights(
    images: Mapping[Combination, int], free: Sequence[Combination], real: int, settings: PlanSettings
) -> tuple[int, int, dict[Combination, int]]:
    """Images that are asked for, those that max_per_cell leaves of them, and the weights to divide them by.

    Args:
        images: Images that the goal wants, by combination.
        free: Combinations that may get images.
        real: Number of real patches.
        settings: Goal, number and bounds.
    """
    weights = {c: images[c] for c in free if c in images}
    low, high = settings.min_per_cell, settings.max_per_cell
    if goal_of(settings) == "tasks":
        asked = int(Decimal(repr(float(settings.ratio or 1))) * sum(weights.values()))
    elif settings.ratio:
        asked = int(Decimal(repr(float(settings.ratio))) * real)  # binary 0.29 × 100 would be 28
        if goal_of(settings) in LACK_GOALS and asked > (lacking := sum(weights.values())):
            # Every combination reaches its level, and the rest is divided evenly.
            rest = apportion(dict.fromkeys(free, 1), asked - lacking) if free else {}
            weights = {c: weights.get(c, 0) + rest[c] for c in free}
            weights = {c: weight for c, weight in weights.items() if weight}
    elif goal_of(settings) in EVEN_GOALS and not settings.per_cell:
        allowed = allowed_images(settings)
        assert allowed is not None  # the settings were checked
        asked = allowed
    else:
        weights = {c: min(max(w, low), high or MOST) for c, w in weights.items()}
        asked = sum(weights.values())
    limited = min(asked, high * len(weights)) if high else asked
    return asked, limited if weights else 0, weights


def _divide(weights: Mapping[Combination, int], wanted: int, settings: PlanSettings) -> dict[Combination, int]:
    """Images by combination within the budget."""
    low, allowed = settings.min_per_cell, allowed_images(settings)
    total = wanted if allowed is None else min(wanted, allowed)
    if total >= MOST:
        raise UserError(
            f"The plan asks for {total} images; the most is {MOST - 1}.", "Lower the number, or set max_per_cell."
        )
    if total < low * len(weights):
        raise UserError(
            f"min_per_cell = {low} for {len(weights)} combinations is {low * len(weights)} images, but only {total} "
            "are to be planned.",
            "Lower min_per_cell, raise the budget or the ratio, or plan fewer combinations with only=… or fields=….",
        )
    return apportion(weights, total, low, settings.max_per_cell or None)


def _table(
    names: Sequence[str],
    schema: Schema,
    wanted: _Wanted,
    verdicts: Mapping[Combination, str],
    counts: Mapping[Combination, int],
    settings: PlanSettings,
) -> pd.DataFrame:
    """The rows of the plan."""
    rows = []
    for combination in wanted.within_reach:
        unidentifiable = verdicts[combination] == "unidentifiable" and not plans_unidentifiable(settings)
        if not counts.get(combination) and not (combination in wanted.images and unidentifiable):
            continue
        values = dict(zip(names, combination, strict=True))
        row = {f.name: values.get(f.name, REAL if f.continuous else "") for f in schema.fields}
        seed = stable_seed(settings.seed, *values.items())
        rows.append({**row, "count": counts.get(combination, 0), "verdict": verdicts[combination], "seed": seed})
    return pd.DataFrame(rows, columns=[*schema.names, *OWN_COLUMNS])
