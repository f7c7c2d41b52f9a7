"""What a dataset lacks: counts, missing values, confounding of class and site, and a verdict for each combination.

A combination without a patch can still be drawn if the effects of its values can be told apart, i.e. if it is
*estimable* in an additive model of its fields: its indicator vector lies in the row space of the seen combinations
(Searle, Linear Models, 1971, chapter 5). For two fields this means that both values lie in one connected component
of the graph whose edges are the seen pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.stats.contingency import association

from latent_medi.errors import UserError, nearest
from latent_medi.metadata.advice import advice, some
from latent_medi.metadata.schema import UNKNOWN_WORD, Schema
from latent_medi.metadata.splits import split_column

VERDICTS = ("seen", "both margins seen", "thin", "unidentifiable")
_MOST_COMBINATIONS = 200_000
_UNITS = {"patches": "key", "slides": "slide", "patients": "patient"}


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
            categorical fields, or of class and site if that has more than 200,000.
        thin_patients: Fewer patients than this are thin.
        split: (name of a split or of its column, part) to look at, such as ``("main", "train")``; by default all rows.
        site_field: The field whose graph with the class is examined.

    Returns:
        JSON-able: ``counts`` (patches, slides, patients), ``margins`` by field and value, ``class_by`` (a list of
        class × value cells by field), ``cells`` (every combination there is), ``continuous``, ``missing`` (share of
        patches by field), ``cramers_v`` (of each categorical field with the class, over patients; null if either is
        constant), ``sites`` (how many), ``components`` of the class–site graph (how many), ``groups`` (the components'
        classes, sites and patients), ``verdicts`` (combination, verdict, reason and counts), ``verdict_counts``,
        ``advice`` (sentences); and ``shared_patients``: how many patients occur at several sites (``count``), and some
        of them with their sites (``examples``).

    Raises:
        UserError: An unknown field, value or split.
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
    cells = _cells(index, names)
    known_class = schema.class_field
    result: dict[str, Any] = {
        "split": label,
        "thin_patients": thin_patients,
        "site_field": site_field,
        "counts": {unit: int(index[column].nunique()) for unit, column in _UNITS.items()},
        "fields": {f.name: f.kind for f in schema.fields},
        "missing": {f.name: _share(_missing(index[f.name])) for f in schema.fields},
        "margins": {name: _margin(index, schema, name) for name in names},
        "continuous": {f.name: _summary(index[f.name]) for f in schema.fields if f.continuous},
        "cells": _records(cells),
        "class_by": {},
        "cramers_v": {},
        "sites": len(_known_values(index, site_field)) if site_field in names else 0,
        "shared_patients": _shared_patients(index, site_field) if site_field in names else {"count": 0, "examples": []},
        "components": 0,
        "groups": [],
    }
    if known_class is not None:
        for name in names[1:]:
            pairs = _cells(index, [known_class.name, name])
            result["class_by"][name] = _records(pairs)
            result["cramers_v"][name] = cramers_v(index, known_class.name, name)
        if site_field in names and site_field != known_class.name:
            result["groups"] = _components(index, known_class.name, site_field)
            result["components"] = len(result["groups"])
    judge = _Judge(index, thin_patients)
    verdicts = [judge(combination) for combination in _wanted(schema, names, site_field, requested)]
    result["verdicts"] = verdicts
    result["verdict_counts"] = {v: sum(entry["verdict"] == v for entry in verdicts) for v in VERDICTS}
    result["advice"] = advice(result, known_class.name if known_class is not None else "")
    return result


def _shared_patients(index: pd.DataFrame, site_field: str) -> dict[str, Any]:
    """Patients that occur at several sites, the first few in order with their sites."""
    pairs = index.loc[~_missing(index[site_field]), ["patient", site_field]].drop_duplicates()
    shared = pairs[pairs["patient"].duplicated(keep=False)].groupby("patient", sort=True)[site_field]
    examples = [{"patient": str(p), "sites": sorted(map(str, sites))} for p, sites in itertools.islice(shared, 5)]
    return {"count": shared.ngroups, "examples": examples}


def verdict(index: pd.DataFrame, combination: Mapping[str, str], thin_patients: int = 10) -> dict[str, Any]:
    """Judge one combination of categorical values by the patches there are.

    - ``seen``: patches of at least ``thin_patients`` patients.
    - ``thin``: patches of fewer patients; or none, and one of its values has fewer.
    - ``both margins seen``: no patch, but each value has patients enough and their effects can be told apart.
    - ``unidentifiable``: no patch, and a value never occurs or its effect cannot be told from another's.

    Returns:
        ``combination``, ``verdict``, ``reason``, ``patches``, ``slides``, ``patients``.

    Raises:
        UserError: A column is absent, or the combination is empty.
    """
    return _Judge(index, thin_patients)(combination)


def cramers_v(index: pd.DataFrame, first: str, second: str) -> float | None:
    """Cramér's V of two categorical columns over patients, 0 (independent) to 1 (one tells the other); ``None`` if
    either is constant.

    A patient counts once for each pair of values that it has; unknown values are left out (Cramér, 1946, chapter 21).
    """
    known = index[~_missing(index[first]) & ~_missing(index[second])].drop_duplicates(["patient", first, second])
    table = pd.crosstab(known[first], known[second]).to_numpy()
    if min(table.shape, default=0) < 2:
        return None
    return min(1.0, float(association(table, method="cramer")))


class _Judge:
    """Verdicts over one index; what depends on the set of fields only is computed once."""

    def __init__(self, index: pd.DataFrame, thin_patients: int) -> None:
        self.index = index
        self.thin = thin_patients
        self._facts: dict[tuple[str, ...], _Facts] = {}

    def __call__(self, combination: Mapping[str, str]) -> dict[str, Any]:
        if not combination:
            raise UserError("A combination names at least one field.")
        names = tuple(combination)
        for name in names:
            if name not in self.index.columns:
                raise UserError(
                    f"The index has no column {name!r}; {nearest(name, [str(c) for c in self.index.columns])}."
                )
        if names not in self._facts:
            self._facts[names] = _Facts(self.index, names)
        values = tuple(str(combination[name]) for name in names)
        counts, word, reason = self._facts[names].judge(values, self.thin)
        return {"combination": dict(zip(names, values, strict=True)), "verdict": word, "reason": reason, **counts}


class _Facts:
    """Counts and the row space of the seen combinations of some fields."""

    def __init__(self, index: pd.DataFrame, names: tuple[str, ...]) -> None:
        self.names = names
        cells = _cells(index, list(names))
        self.cells = {tuple(row[n] for n in names): {u: int(row[u]) for u in _UNITS} for row in _records(cells)}
        known = {name: index[~_missing(index[name])] for name in names}
        self.margins = {n: known[n].groupby(n, observed=True)["patient"].nunique().to_dict() for n in names}
        self.columns = {level: i for i, level in enumerate((n, v) for n in names for v in sorted(self.margins[n]))}
        # The row space of the seen combinations' indicators X is the range of their Gram matrix XᵀX, which has as many
        # rows as there are values, however many combinations were seen; a vector lies in it if it is orthogonal to the
        # null space. Scaled by the values' frequencies, since an even spectrum tells zero from small more surely.
        levels = len(self.columns)
        where = [self.columns[level] for values in self.cells for level in zip(names, values, strict=True)]
        rows = np.repeat(np.arange(len(self.cells)), len(names))
        seen = coo_matrix((np.ones(len(where)), (rows, where)), shape=(len(self.cells), levels)).tocsr()
        scale = 1 / np.sqrt(np.asarray(seen.sum(0)).reshape(-1).clip(min=1))
        sizes, vectors = np.linalg.eigh((seen.T @ seen).toarray() * np.outer(scale, scale))
        self._null = vectors[:, sizes <= 1e-9] * scale[:, None]
        self._length = scale
        self._linked: dict[tuple[int, int], dict[tuple[int, str], int]] = {}

    def _estimable(self, values: tuple[str, ...]) -> bool:
        levels = [self.columns[level] for level in zip(self.names, values, strict=True)]
        off = np.linalg.norm(self._null[levels].sum(0))
        return bool(off <= 1e-6 * np.linalg.norm(self._length[levels]))

    def judge(self, values: tuple[str, ...], thin: int) -> tuple[dict[str, int], str, str]:
        counts = self.cells.get(values, dict.fromkeys(_UNITS, 0))
        patients = counts["patients"]
        if patients >= thin:
            return counts, "seen", f"{patients} patients"
        if patients:
            return counts, "thin", f"{patients} patients, fewer than {thin}"
        named = [(n, v, int(self.margins[n].get(v, 0))) for n, v in zip(self.names, values, strict=True)]
        if never := [f"{n} = {v!r}" for n, v, count in named if not count]:
            return counts, "unidentifiable", f"no patch has {' or '.join(never)}"
        if not self._estimable(values):
            return counts, "unidentifiable", self._why(values)
        if few := [f"{n} = {v!r} has {count} patients" for n, v, count in named if count < thin]:
            return counts, "thin", f"no patch; {' and '.join(few)}, fewer than {thin}"
        return (
            counts,
            "both margins seen",
            "no patch; " + ", ".join(f"{n} = {v!r}: {count} patients" for n, v, count in named),
        )

    def _why(self, values: tuple[str, ...]) -> str:
        for a, b in itertools.combinations(range(len(self.names)), 2):
            if (a, b) not in self._linked:
                self._linked[a, b] = component_of({(cell[a], cell[b]) for cell in self.cells})
            of = self._linked[a, b]
            if of.get((0, values[a])) != of.get((1, values[b])):
                first, second = f"{self.names[a]} = {values[a]!r}", f"{self.names[b]} = {values[b]!r}"
                return f"no chain of seen combinations links {first} and {second}: their effects cannot be told apart"
        return "its effects cannot be told apart from those of other values: they only occur together"


def component_of(pairs: set[tuple[str, str]]) -> dict[tuple[int, str], int]:
    """Component of the graph of seen pairs that each value lies in: (0, value) of the first field, (1, value) of the
    second. Only within a component can the effects of both fields be told apart."""
    nodes = {node: i for i, node in enumerate(sorted({(0, a) for a, _ in pairs} | {(1, b) for _, b in pairs}))}
    if not nodes:
        return {}
    edges = np.array([[nodes[0, a], nodes[1, b]] for a, b in sorted(pairs)])
    graph = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    return {node: int(labels[i]) for node, i in nodes.items()}


def _components(index: pd.DataFrame, class_field: str, site_field: str) -> list[dict[str, Any]]:
    """Connected components of the class–site graph, the one with most patients first."""
    known = index[~_missing(index[class_field]) & ~_missing(index[site_field])]
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


def _missing(column: pd.Series) -> pd.Series:
    return column.isna() if pd.api.types.is_numeric_dtype(column) else column == UNKNOWN_WORD


def _share(mask: pd.Series) -> float:
    return float(mask.mean()) if len(mask) else 0.0


def _cells(index: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Counts of every combination that occurs, rows with an unknown value left out."""
    known = index[[*names, *_UNITS.values()]]
    for name in names:
        known = known[~_missing(known[name])]
    if not names or not len(known):
        return pd.DataFrame(columns=[*names, *_UNITS])
    cells = known.groupby(names, observed=True, sort=True)
    result = cells.size().rename("patches").reset_index()  # a key is one patch
    for unit, column in _UNITS.items():
        if unit != "patches":  # distinct pairs are counted several times faster than with nunique
            pairs = known[[*names, column]].drop_duplicates().groupby(names, observed=True, sort=True)
            result[unit] = pairs.size().to_numpy()
    return result[[*names, *_UNITS]]


def _records(cells: pd.DataFrame) -> list[dict[str, Any]]:
    return [
        {str(k): int(v) if k in _UNITS else str(v) for k, v in row.items()} for row in cells.to_dict(orient="records")
    ]


def _margin(index: pd.DataFrame, schema: Schema, name: str) -> dict[str, dict[str, int]]:
    """Counts by value, the vocabulary's unused values as 0."""
    there = {row[name]: {unit: row[unit] for unit in _UNITS} for row in _records(_cells(index, [name]))}
    return {value: there.get(value, dict.fromkeys(_UNITS, 0)) for value in schema.field(name).values}


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
    cells = pd.DataFrame(result["class_by"][site_field], columns=[class_field, site_field, *_UNITS])
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
