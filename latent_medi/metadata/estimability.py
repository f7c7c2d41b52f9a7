"""Verdicts on combinations: which ones can be generated although few or no patches have them.

A combination without a patch can be generated if it is *estimable* in an additive model of its fields: its indicator
vector is in the row space of the seen combinations (Searle, Linear Models, 1971, chapter 5). For two fields this means
that both values are in one connected component of the graph whose edges are the seen pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.metadata.tables import require_columns

VERDICTS = ("seen", "both margins seen", "thin", "unidentifiable")
UNITS = {"patches": "key", "slides": "slide", "patients": "patient"}
_MOST_VALUES = 4_000  # of all fields of a combination: the Gram matrix has that many rows


def verdict(index: pd.DataFrame, combination: Mapping[str, str], thin_patients: int = 10) -> dict[str, Any]:
    """The verdict on one combination of categorical values.

    - ``seen``: patches of at least ``thin_patients`` patients.
    - ``thin``: patches of fewer patients; or no patch, and a value with fewer patients.
    - ``both margins seen``: no patch, but each value has enough patients and the combination is estimable.
    - ``unidentifiable``: no patch, and a value never occurs or the combination is not estimable.

    Returns:
        ``combination``, ``verdict``, ``reason``, ``patches``, ``slides``, ``patients``.

    Raises:
        UserError: A column is absent, or the combination is empty.
    """
    return Verdicts(index, thin_patients)(combination)


class Verdicts:
    """Verdicts on combinations of one index; what depends only on the fields is computed once."""

    def __init__(self, index: pd.DataFrame, thin_patients: int) -> None:
        self.index = index
        self.thin = thin_patients
        self._seen: dict[tuple[str, ...], _SeenCombinations] = {}

    def __call__(self, combination: Mapping[str, str]) -> dict[str, Any]:
        if not combination:
            raise UserError("A combination has at least one field.")
        names = tuple(combination)
        if names not in self._seen:
            require_columns(self.index, names, "The index")
            self._seen[names] = _SeenCombinations(self.index, names)
        values = tuple(str(combination[name]) for name in names)
        counts, word, reason = self._seen[names].verdict(values, self.thin)
        return {"combination": dict(zip(names, values, strict=True)), "verdict": word, "reason": reason, **counts}


class _SeenCombinations:
    """Counts and row space of the seen combinations of some fields."""

    def __init__(self, index: pd.DataFrame, names: tuple[str, ...]) -> None:
        self.names = names
        cells = count_combinations(index, list(names))
        self.cells = {tuple(row[n] for n in names): {u: int(row[u]) for u in UNITS} for row in records(cells)}
        known = {name: index[~missing(index[name])] for name in names}
        self.margins = {n: known[n].groupby(n, observed=True)["patient"].nunique().to_dict() for n in names}
        self.columns = {level: i for i, level in enumerate((n, v) for n in names for v in sorted(self.margins[n]))}
        self._linked: dict[tuple[int, int], dict[tuple[int, str], int]] = {}
        if len(names) == 2:  # the graph of seen pairs decides
            return
        levels = len(self.columns)
        if levels > _MOST_VALUES:
            raise UserError(
                f"{', '.join(names)} have {levels} values together; the most is {_MOST_VALUES}.",
                "Choose fewer fields, or merge rare values.",
            )
        # The row space of the seen combinations' indicators X is the range of the Gram matrix XᵀX, which has as many
        # rows as there are values. A vector is in it if it is orthogonal to the null space. Scaling by the values'
        # frequencies separates zero eigenvalues from small ones.
        where = [self.columns[level] for values in self.cells for level in zip(names, values, strict=True)]
        rows = np.repeat(np.arange(len(self.cells)), len(names))
        seen = coo_matrix((np.ones(len(where)), (rows, where)), shape=(len(self.cells), levels)).tocsr()
        scale = 1 / np.sqrt(np.asarray(seen.sum(0)).reshape(-1).clip(min=1))
        sizes, vectors = np.linalg.eigh((seen.T @ seen).toarray() * np.outer(scale, scale))
        self._null = vectors[:, sizes <= 1e-9] * scale[:, None]
        self._length = scale

    def _link(self, a: int, b: int) -> dict[tuple[int, str], int]:
        if (a, b) not in self._linked:
            self._linked[a, b] = component_of({(cell[a], cell[b]) for cell in self.cells})
        return self._linked[a, b]

    def _estimable(self, values: tuple[str, ...]) -> bool:
        if len(values) == 2:
            of = self._link(0, 1)
            return of.get((0, values[0])) == of.get((1, values[1]), -1)
        levels = [self.columns[level] for level in zip(self.names, values, strict=True)]
        off = np.linalg.norm(self._null[levels].sum(0))
        return bool(off <= 1e-6 * np.linalg.norm(self._length[levels]))

    def verdict(self, values: tuple[str, ...], thin: int) -> tuple[dict[str, int], str, str]:
        counts = self.cells.get(values, dict.fromkeys(UNITS, 0))
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
            of = self._link(a, b)
            if of.get((0, values[a])) != of.get((1, values[b])):
                first, second = f"{self.names[a]} = {values[a]!r}", f"{self.names[b]} = {values[b]!r}"
                return f"no chain of seen combinations links {first} and {second}: their effects cannot be separated"
        return "its effects cannot be separated from those of other values: they only occur together"


def component_of(pairs: set[tuple[str, str]]) -> dict[tuple[int, str], int]:
    """The component of the graph of seen pairs of each value: (0, value) of the first field, (1, value) of the second.
    The effects of both fields can only be separated within a component."""
    nodes = {node: i for i, node in enumerate(sorted({(0, a) for a, _ in pairs} | {(1, b) for _, b in pairs}))}
    if not nodes:
        return {}
    edges = np.array([[nodes[0, a], nodes[1, b]] for a, b in sorted(pairs)])
    graph = coo_matrix((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    return {node: int(labels[i]) for node, i in nodes.items()}


def missing(column: pd.Series) -> pd.Series:
    """Which rows have no value, as booleans."""
    return column.isna() if pd.api.types.is_numeric_dtype(column) else column == UNKNOWN_WORD


def count_combinations(index: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Patches, slides and patients of every combination that occurs; rows with an unknown value are left out.

    Raises:
        UserError: A field has the name of a count.
    """
    if taken := [name for name in names if name in UNITS]:
        raise UserError(
            f"A field called {taken[0]!r} cannot be audited: that is the name of a count.",
            "Leave it out with fields=…, or rename the column and import the data again.",
        )
    known = index[[*names, *UNITS.values()]]
    for name in names:
        known = known[~missing(known[name])]
    if not names or not len(known):
        return pd.DataFrame(columns=[*names, *UNITS])
    cells = known.groupby(names, observed=True, sort=True)
    result = cells.size().rename("patches").reset_index()  # a key is one patch
    for unit, column in UNITS.items():
        if unit != "patches":  # several times faster than nunique
            pairs = known[[*names, column]].drop_duplicates().groupby(names, observed=True, sort=True)
            result[unit] = pairs.size().to_numpy()
    return result[[*names, *UNITS]]


def records(cells: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of :func:`count_combinations`, JSON-able."""
    return [
        {str(k): int(v) if k in UNITS else str(v) for k, v in row.items()} for row in cells.to_dict(orient="records")
    ]
