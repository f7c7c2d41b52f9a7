"""The audit of a dataset: counts, missing values, association of class and site, and a verdict for each combination."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.metadata.association import class_separation, cramers_v, repeats_class
from latent_medi.metadata.audit_text import advice
from latent_medi.metadata.estimability import (
    UNITS,
    VERDICTS,
    Verdicts,
    component_of,
    count_combinations,
    missing,
    records,
)
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.metadata.splits import split_column
from latent_medi.metadata.suspect_values import are_tcga_codes, looks_missing, spelled_alike

_MOST_COMBINATIONS = 200_000
_MOST_PAIRS = 1_000_000  # cells of a table of two fields


def audit(
    index: pd.DataFrame,
    schema: Schema,
    requested: Sequence[Mapping[str, str]] | None = None,
    thin_patients: int = 10,
    split: tuple[str, str] | None = None,
    site_field: str = "site",
) -> dict[str, Any]:
    """What a person should know about a dataset before training on it.

    Args:
        index: A row per patch: key, slide, patient and the schema's fields.
        schema: The fields.
        requested: Combinations to give a verdict on, value by categorical field; by default all combinations of class
            and categorical fields, or of class and site if those are more than 200,000.
        thin_patients: A combination with fewer patients is thin; without a patch, one with fewer effective patients.
        split: A split, by its name or column, and its part, such as ``("main", "train")``; by default all rows.
        site_field: The field whose graph with the class is examined.

    Returns:
        JSON-able: ``counts`` (patches, slides, patients), ``margins`` by field and value, ``class_by`` (a list of
        class × value counts by field), ``cells`` (every combination that occurs), ``continuous``, ``missing`` (share of
        patches by field), ``cramers_v`` (of each categorical field with the class, over patients; null if either is
        constant), ``repeats_class`` (which of both determines the other, "class", "field" or "both", by categorical
        field that repeats the class), ``class_separation`` (by continuous field, the two classes it separates best),
        ``sites`` (how many), ``components`` of the class–site graph (how many), ``groups`` (the components' classes,
        sites and patients), ``verdicts`` (combination, verdict, reason, counts and effective patients),
        ``verdict_counts``, ``advice`` (sentences); ``held_out_candidates``: seen combinations of class and site to
        test the generation of unseen ones with (``combination``, ``patients``, the ``effective_patients`` on which it
        would rest without them, and whether both are ``enough``), the best first; ``shared_patients``: how many
        patients occur at several sites (``count``), and some of them with their sites (``examples``);
        ``spelled_alike``: by field (and ``patient``) groups of values that differ in spelling only, each with its
        patches; and ``looks_missing``: by field the values that look like a word for missing, with their patches.

    Raises:
        UserError: An unknown field, value or split, or fields with too many values for a table of two.
    """
    index, label = _rows_of(index, split)
    names = [f.name for f in schema.fields if not f.continuous]
    class_name = schema.class_field.name if schema.class_field is not None else ""
    wanted = _wanted(schema, names, site_field, requested)
    has_site = site_field in names
    result: dict[str, Any] = {
        "split": label,
        "thin_patients": thin_patients,
        "site_field": site_field,
        "counts": {unit: int(index[column].nunique()) for unit, column in UNITS.items()},
        "fields": {f.name: f.kind for f in schema.fields},
        "missing": {f.name: _share(missing(index[f.name])) for f in schema.fields},
        "margins": {name: _margin(index, schema, name) for name in names},
        "continuous": {f.name: _summary(index[f.name]) for f in schema.fields if f.continuous},
        "cells": records(count_combinations(index, names)),
        **_association(index, schema, class_name, names),
        "sites": len(set(index[site_field].unique()) - {UNKNOWN_WORD}) if has_site else 0,
        "shared_patients": _shared_patients(index, site_field) if has_site else {"count": 0, "examples": []},
        "spelled_alike": _spelled_alike(index, names),
        "looks_missing": _looks_missing(index, names),
        "components": 0,
        "groups": [],
        "held_out_candidates": [],
    }
    if class_name and has_site and site_field != class_name:
        result["groups"] = _components(index, class_name, site_field)
        result["components"] = len(result["groups"])
    verdict_of = Verdicts(index, thin_patients)
    if result["groups"]:
        result["held_out_candidates"] = verdict_of.held_out_candidates([class_name, site_field])
    result["verdicts"] = [verdict_of(combination) for combination in wanted]
    words = [entry["verdict"] for entry in result["verdicts"]]
    result["verdict_counts"] = {verdict: words.count(verdict) for verdict in VERDICTS}
    others = [
        name for name in names if name != class_name and (name == site_field or name not in result["repeats_class"])
    ]
    result["advice"] = advice(result, class_name, _repeated(index, others, site_field))
    return result


def _repeated(index: pd.DataFrame, names: Sequence[str], site_field: str) -> list[tuple[str, str, bool]]:
    """Categorical fields that repeat another one: the field to leave out, the other, and whether a value of the first
    is all that the other has. The site stays. A site code is known to name a site, so it is not listed.
    """
    ordered = sorted(
        (name for name in names if name == site_field or name != "tss"), key=lambda name: name != site_field
    )
    found: dict[str, tuple[str, str, bool]] = {}
    for one, other in itertools.combinations(ordered, 2):
        if {one, other} & found.keys() or index[one].nunique() * index[other].nunique() > _MOST_PAIRS:
            continue
        by = repeats_class(index[["patient", one, other]].drop_duplicates(), one, other)
        if by == "field" and one != site_field:
            one, other, by = other, one, "class"  # the coarser of two is left out
        if by:
            found[other] = (other, one, by != "field")
    return [*found.values()]


def _rows_of(index: pd.DataFrame, split: tuple[str, str] | None) -> tuple[pd.DataFrame, str]:
    """The rows of one part of a split, and a label such as ``split_main = train``."""
    label = ""
    if split is not None:
        column = split_column(index, split[0])
        parts = sorted({str(part) for part in index[column].unique()} - {""})
        index, label = index[index[column] == split[1]], f"{column} = {split[1]}"
        if not len(index):
            raise UserError(f"No patch has {label}.", f"Parts of this split: {', '.join(parts) or 'none'}.")
    if not len(index):
        raise UserError("The dataset has no patch.")
    return index, label


def _association(index: pd.DataFrame, schema: Schema, class_name: str, names: Sequence[str]) -> dict[str, Any]:
    """How the fields depend on the class: counts by class and value, Cramér's V, what repeats or separates classes."""
    others = [name for name in names if class_name and name != class_name]
    for name in others:
        classes, values = (len(schema.field(field).values) for field in (class_name, name))
        if classes * values > _MOST_PAIRS:
            raise UserError(
                f"{class_name} has {classes} values and {name} {values}: too many for a table of both.",
                f"Check that {name} is categorical and {class_name} is the class. Leave fields out, or merge rare "
                "values.",
            )
    pairs = {name: index[["patient", class_name, name]].drop_duplicates() for name in others}  # few rows of many
    return {
        "class_by": {name: records(count_combinations(index, [class_name, name])) for name in others},
        "cramers_v": {name: cramers_v(pairs[name], class_name, name) for name in others},
        "repeats_class": {name: by for name in others if (by := repeats_class(pairs[name], class_name, name))},
        "class_separation": {
            name: class_separation(index, class_name, name)
            for name in (f.name for f in schema.fields if f.continuous and class_name)
        },
    }


def _spelled_alike(index: pd.DataFrame, names: Sequence[str]) -> dict[str, list[dict[str, int]]]:
    """By field, groups of values that differ in spelling only, with their patches. Names of patients are included: a
    patient under two names can be in two parts of a split."""
    found = {}
    for name in ("patient", *names):
        counts = index[name].astype(str).value_counts()
        if groups := spelled_alike(counts.index):
            found[name] = [{value: int(counts[value]) for value in group} for group in groups]
    return found


def _looks_missing(index: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """By field, the values that look like a word for missing, with their patches."""
    found = {}
    for name in ("patient", *names):
        counts = index[name].astype(str).value_counts().sort_index()
        words = {str(value): int(count) for value, count in counts.items() if looks_missing(str(value))}
        if words and not are_tcga_codes(value for value in counts.index if not is_missing(value)):
            found[name] = words
    return found


def _shared_patients(index: pd.DataFrame, site_field: str) -> dict[str, Any]:
    """The number of patients that occur at several sites, and the first five with their sites."""
    pairs = index.loc[~missing(index[site_field]), ["patient", site_field]].drop_duplicates()
    shared = pairs[pairs["patient"].duplicated(keep=False)].groupby("patient", sort=True)[site_field]
    examples = [{"patient": str(p), "sites": sorted(map(str, sites))} for p, sites in itertools.islice(shared, 5)]
    return {"count": shared.ngroups, "examples": examples}


def _components(index: pd.DataFrame, class_field: str, site_field: str) -> list[dict[str, Any]]:
    """Connected components of the class–site graph, the one with most patients first."""
    known = index[~missing(index[class_field]) & ~missing(index[site_field])]
    of = component_of(set(zip(known[class_field], known[site_field], strict=True)))
    member = known[class_field].map(lambda value: of[0, value])
    found = []
    for number in sorted(set(of.values())):
        classes, sites = (sorted(v for (axis, v), c in of.items() if (axis, c) == (i, number)) for i in (0, 1))
        patients = int(known.loc[member == number, "patient"].nunique())
        found.append({"classes": classes, "sites": sites, "patients": patients})
    return sorted(found, key=lambda c: (-c["patients"], c["classes"]))


def _share(mask: pd.Series) -> float:
    return float(mask.mean()) if len(mask) else 0.0


def _margin(index: pd.DataFrame, schema: Schema, name: str) -> dict[str, dict[str, int]]:
    """Counts by value; 0 for values of the vocabulary that do not occur."""
    counts = {row[name]: {unit: row[unit] for unit in UNITS} for row in records(count_combinations(index, [name]))}
    return {value: counts.get(value, dict.fromkeys(UNITS, 0)) for value in schema.field(name).values}


def _summary(column: pd.Series) -> dict[str, float | int]:
    numbers = column.dropna()
    if not len(numbers):
        return {"patches": 0}
    return {
        "patches": len(numbers),
        "mean": float(numbers.mean()),
        "std": float(numbers.std(ddof=0)),
        "min": float(numbers.min()),
        "max": float(numbers.max()),
    }


def _wanted(
    schema: Schema, names: list[str], site_field: str, requested: Sequence[Mapping[str, str]] | None
) -> list[Mapping[str, str]]:
    if requested is None:
        if math.prod(len(schema.field(name).values) for name in names) > _MOST_COMBINATIONS:
            # All combinations would fill gigabytes; the graph is of class and site.
            names = [name for name in names if schema.field(name).kind == "class" or name == site_field]
        size = math.prod(len(schema.field(name).values) for name in names)
        if size > _MOST_COMBINATIONS:
            raise UserError(
                f"{' × '.join(names)} has {size} combinations; the most is {_MOST_COMBINATIONS}.",
                "Choose combinations with requested=…, or merge rare values.",
            )
        product = itertools.product(*(schema.field(name).values for name in names))
        return [dict(zip(names, values, strict=True)) for values in product] if names else []
    for combination in requested:
        for name, value in combination.items():
            if schema.field(name).continuous:
                raise UserError(f"Field {name!r} is continuous: combinations have class and categorical fields only.")
            schema.field(name).code(value)
    return list(requested)


def class_by_site(result: Mapping[str, Any], unit: str = "patients") -> pd.DataFrame:
    """The counts by class and site of an audit.

    Raises:
        UserError: The audited data have no class or not that site field.
    """
    class_field = next((name for name, kind in result["fields"].items() if kind == "class"), "")
    site_field = result["site_field"]
    if not class_field or site_field not in result["class_by"]:
        raise UserError(f"The data have no class or no field {site_field!r}.")
    cells = pd.DataFrame(result["class_by"][site_field], columns=[class_field, site_field, *UNITS])
    counts = cells.pivot_table(index=class_field, columns=site_field, values=unit, fill_value=0, aggfunc="sum")
    return counts.reindex(
        index=list(result["margins"][class_field]), columns=list(result["margins"][site_field]), fill_value=0
    ).rename_axis(index=class_field, columns=site_field)
