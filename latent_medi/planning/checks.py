"""Every problem of a plan's settings, reported at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

from latent_medi.core.errors import UserError, nearest
from latent_medi.metadata.gdc_table import SITE_CODE_COLUMNS
from latent_medi.metadata.schema import Schema
from latent_medi.planning.settings import PlanSettings

EVEN_GOALS = ("fill_unseen", "each", "all_sites_of_classes", "own_sites")
"""Goals that want the same number for every combination."""
LACK_GOALS = ("balance", "within_site", "target")
"""Goals that want for every combination what it lacks."""
SITE_GOALS = ("all_sites_of_classes", "own_sites", "within_site", "tasks")
"""Goals that need a class and a site."""


def goal_of(settings: PlanSettings) -> str:
    """The goal; by default "target" with a target table, "tasks" with tasks, otherwise "fill_unseen"."""
    return settings.goal or ("target" if settings.target else "tasks" if settings.tasks else "fill_unseen")


def combined_names(settings: PlanSettings, schema: Schema) -> list[str]:
    """The class and categorical fields that a plan combines without a target, in the schema's order.

    If ``fields`` names none, these are all but one: a site code says the same as the institution with the class, so of
    both only ``site_field`` is combined.
    """
    plain = [f.name for f in schema.fields if not f.continuous]
    if settings.fields:
        return [name for name in plain if name in settings.fields]
    site = settings.site_field
    codes = [name for name in SITE_CODE_COLUMNS if name in plain]
    said_twice = [name for name in codes if name != site] if site in plain else []
    if site in codes:
        said_twice.append("site")
    return [name for name in plain if name not in said_twice or name in settings.only]


def plans_unidentifiable(settings: PlanSettings) -> bool:
    """Whether combinations that the data cannot identify get images; those of tasks do, as in MeDi's study."""
    return settings.force_unidentifiable or goal_of(settings) == "tasks"


def problems_of(settings: PlanSettings) -> list[str]:
    """Problems of the settings that do not depend on the data."""
    goal = goal_of(settings)
    found: list[str] = []
    if goal == "target" and not settings.target:
        found.append("the goal 'target' needs a target table: target=wanted.csv")
    if goal != "target" and settings.target:
        found.append(f"target is the goal, so goal={goal} contradicts it")
    found += _problems_of_tasks(settings)
    if settings.target:
        named = [name for name in ("per_cell", "ratio", "fields", "only") if getattr(settings, name)]
        found += [f"target says which combinations reach which number, so {name} contradicts it" for name in named]
    elif settings.per_cell and settings.ratio:
        found.append("per_cell and ratio both set the number: give one")
    if goal == "within_site" and settings.per_cell:
        found.append("the goal 'within_site' reaches the largest class of each site, so per_cell contradicts it")
    if goal in EVEN_GOALS and not (settings.per_cell or settings.ratio or settings.max_images or settings.gpu_hours):
        found.append(f"the goal {goal!r} needs a number: per_cell, ratio, or a budget to be spread evenly")
    if settings.spread == "real" and not (goal == "own_sites" and settings.ratio):
        found.append("spread=real shares a ratio among the real combinations: it needs goal=own_sites and ratio")
    if settings.gpu_hours and not settings.images_per_s:
        found.append("gpu_hours needs images_per_s, the images that one GPU generates in a second")
    elif 0 < settings.gpu_hours * settings.images_per_s < math.inf and not allowed_images(settings):
        found.append(f"{settings.gpu_hours} GPU-hours are not one image at {settings.images_per_s} images/s")
    if settings.max_per_cell and settings.min_per_cell > settings.max_per_cell:
        found.append(f"min_per_cell = {settings.min_per_cell} is above max_per_cell = {settings.max_per_cell}")
    found += [f"only names no value of {name!r}" for name, values in settings.only.items() if not values]
    return found


def _problems_of_tasks(settings: PlanSettings) -> list[str]:
    goal, found = goal_of(settings), []
    if goal == "tasks" and not settings.tasks:
        found.append("the goal 'tasks' needs tasks: tasks.nsclc='[LUAD, LUSC]'")
    if goal != "tasks" and settings.tasks:
        found.append(f"tasks are the goal, so goal={goal} contradicts them")
    if goal == "tasks" and settings.per_cell:
        found.append("the goal 'tasks' counts real patches, so per_cell contradicts it (ratio multiplies them)")
    for name, values in settings.tasks.items():
        if len(set(values)) < max(2, len(values)):
            found.append(f"the task {name!r} needs two or more different classes, not {values}")
    return found


def problems_with(settings: PlanSettings, schema: Schema) -> list[str]:
    """Problems of the settings with data of that schema."""
    plain = [f.name for f in schema.fields if not f.continuous]
    found = []
    for what, names in (("fields", settings.fields), ("only", list(settings.only))):
        for name in names:
            if name not in schema.names:
                found.append(f"{what}: there is no field {name!r} ({nearest(name, plain)})")
            elif name not in plain:
                found.append(f"{what}: {name!r} is continuous; a plan combines the class and categorical fields")
    for name in [name for name in settings.only if name in plain]:
        known = schema.field(name).values
        found += [
            f"only: {name!r} has no value {value!r} ({nearest(value, known)})"
            for value in settings.only[name]
            if value not in known
        ]
        if settings.fields and name not in settings.fields:
            found.append(f"only names {name!r}, which is not among the fields that are combined")
    if len(set(settings.fields)) < len(settings.fields):
        found.append(f"fields names a field twice: {settings.fields}")
    names = combined_names(settings, schema)
    if not names and not found:
        found.append("a plan combines the class and categorical fields, and the data have none")
    known_class = schema.class_field
    classes = known_class.values if known_class else ()
    found += [
        f"tasks: {name!r} names the class {value!r}, which the data lack ({nearest(value, classes)})"
        for name, values in settings.tasks.items()
        for value in values
        if value not in classes
    ]
    if (
        goal_of(settings) in SITE_GOALS
        and not found
        and (known_class is None or names[0] != known_class.name or not names[1:])
    ):
        found.append(f"the goal {goal_of(settings)!r} combines the class with a site, not {' × '.join(names)}")
    return found


def refusal(problems: Sequence[str]) -> UserError:
    """The error that lists some problems."""
    if len(problems) == 1:
        return UserError(f"There can be no such plan: {problems[0]}.")
    return UserError(f"There can be no such plan, for {len(problems)} reasons:\n  " + "\n  ".join(problems))


def allowed_images(settings: PlanSettings) -> int | None:
    """The budget in images; ``None`` without one."""
    budgets = [settings.max_images] if settings.max_images else []
    if settings.gpu_hours:
        hours, speed = (Decimal(repr(float(x))) for x in (settings.gpu_hours, settings.images_per_s))
        budgets.append(int(hours * 3600 * speed))
    return min(budgets, default=None)
