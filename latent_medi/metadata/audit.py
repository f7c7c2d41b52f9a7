"""What a dataset lacks: counts, missing values, confounding of class and site, and a verdict for each combination."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from scipy.stats.contingency import association

from latent_medi.core.errors import UserError
from latent_medi.metadata.advice import advice, some
from latent_medi.metadata.estimability import UNITS, VERDICTS, Judge, component_of, count_cells, missing, records
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.metadata.spelling import looks_missing, spelled_alike
from latent_medi.metadata.splits import split_column

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
    """Everything that a person should know about a dataset before training on it.

    Args:
        index: A row per patch: key, slide, patient and the schema's fields.
        schema: The fields.
        requested: Combinations to judge, value by categorical field; by default the whole product of class and
            categorical fields, or of class and site if that has more than 200,000 combinations.
        thin_patients: Fewer patients than this are thin.
        split: (name of a split or of its column, part) to look at, such as ``("main", "train")``; by default all rows.
        site_field: The field whose graph with the class is examined.

    Returns:
        JSON-able: ``counts`` (patches, slides, patients), ``margins`` by field and value, ``class_by`` (a list of
        class × value cells by field), ``cells`` (every combination there is), ``continuous``, ``missing`` (share of
        patches by field), ``cramers_v`` (of each categorical field with the class, over patients; null if either is
        constant), ``sites`` (how many), ``components`` of the class–site graph (how many), ``groups`` (the components'
        classes, sites and patients), ``verdicts`` (combination, verdict, reason and counts), ``verdict_counts``,
        ``advice`` (sentences); ``shared_patients``: how many patients occur at several sites (``count``), and some of
        them with their sites (``examples``); ``spelled_alike``: by field (and ``patient``) groups of values that differ
        in spelling only, each with its patches; and ``looks_missing``: by field the values that look like a word for
        missing, with their patches.

    Raises:
        UserError: An unknown field, value or split, or fields with too many values to be compared pair by pair.
    """
    label = ""
    if split is not None:
        column = split_column(index, split[0])
        parts = sorted({str(part) for part in index[column].unique()} - {""})
        index = index[index[column] == split[1]]
        label = f"{column} = {split[1]}"
        if not len(index):
            raise UserError(f"There is no patch to audit with {label}; its parts: {', '.join(parts) or 'none'}.")
    if not len(index):
        raise UserError("There is no patch to audit.")
    names = [f.name for f in schema.fields if not f.continuous]
    known_class = schema.class_field
    wanted = _wanted(schema, names, site_field, requested)
    if known_class is not None:
        _check_pairs(schema, known_class.name, names[1:])
    cells = count_cells(index, names)
    result: dict[str, Any] = {
        "split": label,
        "thin_patients": thin_patients,
        "site_field": site_field,
        "counts": {unit: int(index[column].nunique()) for unit, column in UNITS.items()},
        "fields": {f.name: f.kind for f in schema.fields},
        "missing": {f.name: _share(missing(index[f.name])) for f in schema.fields},
        "margins": {name: _margin(index, schema, name) for name in names},
        "continuous": {f.name: _summary(index[f.name]) for f in schema.fields if f.continuous},
        "cells": records(cells),
        "class_by": {},
        "cramers_v": {},
        "sites": len(_known_values(index, site_field)) if site_field in names else 0,
        "shared_patients": _shared_patients(index, site_field) if site_field in names else {"count": 0, "examples": []},
        "spelled_alike": _spelled_alike(index, names),
        "looks_missing": _looks_missing(index, names),
        "components": 0,
        "groups": [],
    }
    if known_class is not None:
        for name in names[1:]:
            pairs = count_cells(index, [known_class.name, name])
            result["class_by"][name] = records(pairs)
            result["cramers_v"][name] = cramers_v(index, known_class.name, name)
        if site_field in names and site_field != known_class.name:
            result["groups"] = _components(index, known_class.name, site_field)
            result["components"] = len(result["groups"])
    judge = Judge(index, thin_patients)
    verdicts = [judge(combination) for combination in wanted]
    result["verdicts"] = verdicts
    result["verdict_counts"] = {v: sum(entry["verdict"] == v for entry in verdicts) for v in VERDICTS}
    result["advice"] = advice(result, known_class.name if known_class is not None else "")
    return result


def _spelled_alike(index: pd.DataFrame, names: Sequence[str]) -> dict[str, list[dict[str, int]]]:
    """By field groups of values that differ in spelling only, with their patches; the patients' names too, since a
    patient under two names can be on both sides of a split."""
    found = {}
    for name in ("patient", *names):
        counts = index[name].astype(str).value_counts()
        if groups := spelled_alike(counts.index):
            found[name] = [{value: int(counts[value]) for value in group} for group in groups]
    return found


def _looks_missing(index: pd.DataFrame, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """By field the values that look like a word for missing, with their patches."""
    found = {}
    for name in ("patient", *names):
        counts = index[name].astype(str).value_counts().sort_index()
        if words := {str(value): int(count) for value, count in counts.items() if looks_missing(str(value))}:
            found[name] = words
    return found


def _check_pairs(schema: Schema, class_field: str, names: Sequence[str]) -> None:
    classes = len(schema.field(class_field).values)
    for name in names:
        if classes * len(schema.field(name).values) > _MOST_PAIRS:
            raise UserError(
                f"{class_field} has {classes} values and {name} {len(schema.field(name).values)}: too many to compare.",
                f"Is {name} a category, and {class_field} the class? Leave out what is not, or merge rare values.",
            )


def _shared_patients(index: pd.DataFrame, site_field: str) -> dict[str, Any]:
    """Patients that occur at several sites, the first few in order with their sites."""
    pairs = index.loc[~missing(index[site_field]), ["patient", site_field]].drop_duplicates()
    shared = pairs[pairs["patient"].duplicated(keep=False)].groupby("patient", sort=True)[site_field]
    examples = [{"patient": str(p), "sites": sorted(map(str, sites))} for p, sites in itertools.islice(shared, 5)]
    return {"count": shared.ngroups, "examples": examples}


def cramers_v(index: pd.DataFrame, first: str, second: str) -> float | None:
    """Cramér's V of two categorical columns over patients, 0 (independent) to 1 (one tells the other); ``None`` if
    either is constant.

    A patient counts once for each pair of values that it has; unknown values are left out (Cramér, 1946, chapter 21).
    """
    known = index[~missing(index[first]) & ~missing(index[second])].drop_duplicates(["patient", first, second])
    table = pd.crosstab(known[first], known[second]).to_numpy()
    if min(table.shape, default=0) < 2:
        return None
    return min(1.0, float(association(table, method="cramer")))


def _components(index: pd.DataFrame, class_field: str, site_field: str) -> list[dict[str, Any]]:
    """Connected components of the class–site graph, the one with most patients first."""
    known = index[~missing(index[class_field]) & ~missing(index[site_field])]
    of = component_of(set(zip(known[class_field], known[site_field], strict=True)))
    member = known[class_field].map(lambda value: of[0, value])
    found = []
    for number in sorted(set(of.values())):
        levels = [sorted(v for (side, v), c in of.items() if side == s and c == number) for s in (0, 1)]
        patients = int(known.loc[member == number, "patient"].nunique())
        found.append({"classes": levels[0], "sites": levels[1], "patients": patients})
    return sorted(found, key=lambda c: (-c["patients"], c["classes"]))


def _known_values(index: pd.DataFrame, name: str) -> set[str]:
    return set(index[name].unique()) - {UNKNOWN_WORD}


def _share(mask: pd.Series) -> float:
    return float(mask.mean()) if len(mask) else 0.0


def _margin(index: pd.DataFrame, schema: Schema, name: str) -> dict[str, dict[str, int]]:
    """Counts by value, the vocabulary's unused values as 0."""
    there = {row[name]: {unit: row[unit] for unit in UNITS} for row in records(count_cells(index, [name]))}
    return {value: there.get(value, dict.fromkeys(UNITS, 0)) for value in schema.field(name).values}


def _summary(column: pd.Series) -> dict[str, float | int]:
    numbers = column.dropna()
    if not len(numbers):
        return {"patches": 0}
    return {
        "patches": len(numbers), "mean": float(numbers.mean()), "std": float(numbers.std(ddof=0)),
        "min": float(numbers.min()), "max": float(numbers.max()),
    }  # fmt: skip


def _wanted(
    schema: Schema, names: list[str], site_field: str, requested: Sequence[Mapping[str, str]] | None
) -> list[Mapping[str, str]]:
    if requested is None:
        if math.prod(len(schema.field(name).values) for name in names) > _MOST_COMBINATIONS:
            # The whole product would say little and fill gigabytes; the pairs are what the graph is about.
            names = [name for name in names if schema.field(name).kind == "class" or name == site_field]
        size = math.prod(len(schema.field(name).values) for name in names)
        if size > _MOST_COMBINATIONS:
            raise UserError(
                f"{' × '.join(names)} has {size} combinations; the most is {_MOST_COMBINATIONS}.",
                "Name those of interest with requested=…, or merge rare values.",
            )
        product = itertools.product(*(schema.field(name).values for name in names))
        return [dict(zip(names, values, strict=True)) for values in product] if names else []
    for combination in requested:
        for name, value in combination.items():
            if schema.field(name).continuous:
                raise UserError(f"Field {name!r} is continuous: a combination is of class and categorical values.")
            schema.field(name).code(value)
    return list(requested)


def class_by_site(result: Mapping[str, Any], unit: str = "patients") -> pd.DataFrame:
    """Counts by class and site out of an audit, 0 where there is none.

    Raises:
        UserError: The audit was of data without a class or without that site field.
    """
    class_field = next((name for name, kind in result["fields"].items() if kind == "class"), "")
    site_field = result["site_field"]
    if not class_field or site_field not in result["class_by"]:
        raise UserError(f"There is no class or no field {site_field!r} to count by.")
    cells = pd.DataFrame(result["class_by"][site_field], columns=[class_field, site_field, *UNITS])
    counts = cells.pivot_table(index=class_field, columns=site_field, values=unit, fill_value=0, aggfunc="sum")
    return counts.reindex(
        index=list(result["margins"][class_field]), columns=list(result["margins"][site_field]), fill_value=0
    ).rename_axis(index=class_field, columns=site_field)


def audit_text(result: Mapping[str, Any], most: int = 40) -> str:
    """The audit as plain text for a terminal; at most ``most`` combinations that are not simply seen are listed."""
    counts = result["counts"]
    unit = "rows" if "table" in result else "patches"
    lines = [f"{counts['patches']} {unit}, {counts['slides']} slides, {counts['patients']} patients"]
    if result["split"]:
        lines[0] += f" ({result['split']})"
    for name, margin in result["margins"].items():
        ranked = sorted(margin.items(), key=lambda item: -item[1]["patients"]) if len(margin) > most else margin.items()
        words = [f"{value} {c['patients']}" for value, c in ranked]
        lines.append(f"{name} ({len(margin)} values; patients): {some(words, most)}")
    for name, told in result["continuous"].items():
        if told["patches"]:
            spread = f"mean {told['mean']:.4g}, from {told['min']:.4g} to {told['max']:.4g}"
            lines.append(f"{name}: {told['patches']} {unit}, {spread}")
    lines += [f"{name}: {share:.1%} of {unit} unknown" for name, share in result["missing"].items() if share]
    for name, value in result["cramers_v"].items():
        told = "not defined (one value only)" if value is None else f"{value:.2f}"
        lines.append(f"association of class and {name} (Cramér's V over patients, 0 to 1): {told}")
    if mapped := result.get("institutions"):
        lines.append(
            f"{mapped['codes']} codes in {mapped['components_of_codes']} components become {mapped['institutions']} "
            f"institutions in {'one' if result['components'] == 1 else result['components']} "
            f"({mapped['source_sites']} names in the code table, {mapped['source_sites_with_several_classes']} with "
            f"several classes; {', '.join(f'{count} {kind}' for kind, count in mapped['kinds'].items())})"
        )
    components = result["groups"]
    if len(components) > 1:
        lines.append(
            f"class and {result['site_field']} fall into {len(components)} separate groups: "
            "effects cannot be told apart across groups"
        )
        lines += [f"  {some(c['classes'])} at {some(c['sites'])} ({c['patients']} patients)" for c in components[:most]]
    elif components:
        lines.append(f"class and {result['site_field']} are linked by seen combinations throughout")
    lines.append("combinations: " + ", ".join(f"{n} {word}" for word, n in result["verdict_counts"].items()))
    # What can be drawn first; what is unidentifiable is often the long rest.
    listed = [v for v in result["verdicts"] if v["verdict"] != "seen"]
    listed.sort(key=lambda v: VERDICTS.index(v["verdict"]))
    for entry in listed[:most]:
        combination = " × ".join(entry["combination"].values())
        lines.append(f"  {combination}: {entry['verdict']} ({entry['reason']})")
    if len(listed) > most:
        lines.append(f"  … and {len(listed) - most} more")
    lines += [f"→ {sentence}" for sentence in result["advice"]]
    return "\n".join(lines)
