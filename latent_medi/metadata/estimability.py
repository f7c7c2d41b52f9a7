"""Verdicts on combinations: which ones can be generated although few or no patches have them.

A combination without a patch can be generated if it is *estimable* in an additive model of its fields, whose design X
has a row for each patient and seen combination: x(X'X)⁺X'X = x for its indicator vector x (Searle, Linear Models, 1971,
chapter 5). The variance of the estimate is then x(X'X)⁺x' times that of a patient; a mean over n patients has 1/n. So
1/(x(X'X)⁺x') is the number of patients that would tell as much if they had the combination: its *effective patients*.
For two fields it is the conductance between both values in the network whose edges are the seen pairs, each with its
patients as its conductance. It is at most the smallest number of patients of a value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components

from latent_medi.core.counting import counted
from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.metadata.tables import require_columns

VERDICTS = ("seen", "both margins seen", "thin", "unidentifiable")
UNITS = {"patches": "key", "slides": "slide", "patients": "patient"}
_MOST_VALUES = 4_000  # of all fields but the one with the most: a dense matrix has that many rows
_ZERO = 1e-9  # an eigenvalue up to here is rounding; one patient among 10⁶ gives more
_ROUNDING = 1e-6  # in effective patients: ten that come out a little below ten are ten


def verdict(index: pd.DataFrame, combination: Mapping[str, str], thin_patients: int = 10) -> dict[str, Any]:
    """The verdict on one combination of categorical values.

    - ``seen``: patches of at least ``thin_patients`` patients.
    - ``thin``: patches of fewer patients; or no patch, and fewer effective patients.
    - ``both margins seen``: no patch, but the combination is estimable, with enough effective patients.
    - ``unidentifiable``: no patch, and a value never occurs or the combination is not estimable.

    Returns:
        ``combination``, ``verdict``, ``reason``, ``patches``, ``slides``, ``patients``, and ``effective_patients``: how
        many patients of its own a combination without a patch is worth; ``None`` with patches, or if unidentifiable.

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
        seen, values = self._seen_of(names), tuple(str(combination[name]) for name in names)
        counts = seen.cells.get(values, dict.fromkeys(UNITS, 0))
        effective = None if counts["patients"] else seen.effective_patients(values)
        word, reason = seen.verdict(values, counts["patients"], effective, self.thin)
        return {
            "combination": dict(zip(names, values, strict=True)),
            "verdict": word,
            "reason": reason,
            **counts,
            "effective_patients": effective,
        }

    def held_out_candidates(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Seen combinations of some fields, as tests of the generation of unseen ones.

        Without its n patients, a combination of E effective patients rests on E − n: taking an observation from a
        linear model takes its weight from the inverse of the variance of its mean (Sherman and Morrison 1950).

        Returns:
            ``combination``, ``patients``, ``effective_patients`` (without them), and ``enough``: whether both are at
            least ``thin_patients``. Those with enough come first, by their patients; then by the smaller number.
        """
        seen, result = self._seen_of(tuple(names)), []
        for values, counts in seen.cells.items():
            patients = counts["patients"]
            without = max((seen.effective_patients(values) or 0.0) - patients, 0.0)
            smaller = min(patients, without + _ROUNDING)
            found: dict[str, Any] = {"combination": dict(zip(names, values, strict=True)), "patients": patients}
            found |= {"effective_patients": without, "enough": smaller >= self.thin}
            result.append((not found["enough"], -patients if found["enough"] else -smaller, found))
        return [found for *_, found in sorted(result, key=lambda entry: entry[:2])]

    def _seen_of(self, names: tuple[str, ...]) -> _SeenCombinations:
        if names not in self._seen:
            require_columns(self.index, names, "The index")
            self._seen[names] = _SeenCombinations(self.index, names)
        return self._seen[names]


class _SeenCombinations:
    """Counts of the seen combinations of some fields, and what they say of others."""

    def __init__(self, index: pd.DataFrame, names: tuple[str, ...]) -> None:
        self.names = names
        cells = count_combinations(index, list(names))
        self.cells = {tuple(row[n] for n in names): {u: int(row[u]) for u in UNITS} for row in records(cells)}
        known = {name: index[~missing(index[name])] for name in names}
        self.margins = {n: known[n].groupby(n, observed=True)["patient"].nunique().to_dict() for n in names}
        self._linked: dict[tuple[int, int], dict[tuple[int, str], int]] = {}

    @cached_property
    def _design(self) -> _Design:
        return _Design(self.names, self.cells)

    def effective_patients(self, values: tuple[str, ...]) -> float | None:
        """Effective patients of a combination without a patch; ``None`` if it is unidentifiable."""
        if not all(self.margins[name].get(value) for name, value in zip(self.names, values, strict=True)):
            return None
        return self._design.effective_patients(values)

    def verdict(self, values: tuple[str, ...], patients: int, effective: float | None, thin: int) -> tuple[str, str]:
        """The verdict and its reason."""
        if patients:
            few = patients < thin
            return "thin" if few else "seen", counted(patients, "patient") + (f", fewer than {thin}" if few else "")
        named = [(n, v, int(self.margins[n].get(v, 0))) for n, v in zip(self.names, values, strict=True)]
        if never := [f"{n} = {v!r}" for n, v, count in named if not count]:
            return "unidentifiable", f"no patch has {' or '.join(never)}"
        if effective is None:
            return "unidentifiable", self._why(values)
        margins = ", ".join(f"{n} = {v!r}: {counted(count, 'patient')}" for n, v, count in named)
        rests = f"no patch; rests on {rounded_down(effective)} effective patients"
        if effective + _ROUNDING < thin:
            return "thin", f"{rests}, fewer than {thin} ({margins})"
        return "both margins seen", f"{rests} ({margins})"

    def _link(self, a: int, b: int) -> dict[tuple[int, str], int]:
        if (a, b) not in self._linked:
            self._linked[a, b] = component_of({(cell[a], cell[b]) for cell in self.cells})
        return self._linked[a, b]

    def _why(self, values: tuple[str, ...]) -> str:
        for a, b in itertools.combinations(range(len(self.names)), 2):
            of = self._link(a, b)
            if of.get((0, values[a])) != of.get((1, values[b])):
                first, second = f"{self.names[a]} = {values[a]!r}", f"{self.names[b]} = {values[b]!r}"
                return f"no chain of seen combinations links {first} and {second}: their effects cannot be separated"
        return "its effects cannot be separated from those of other values: they only occur together"


class _Design:
    """The additive model of some fields on the patients of the seen combinations.

    The Gram matrix X'X has a row per value. The field with the most values (the *long* one) has a diagonal block D in
    it, since a patient has one value of it in a combination; what remains after it is eliminated, S = A − B D⁻¹ B', has
    a row for each value of the other fields. With x = (u, v), v the long field's part, and w = u − B D⁻¹ v:
    x(X'X)⁺x' = v'D⁻¹v + w'S⁺w, and x is estimable where w is in the range of S.

    Args:
        names: The fields.
        cells: Counts by seen combination.

    Raises:
        UserError: The fields have too many values.
    """

    def __init__(self, names: tuple[str, ...], cells: Mapping[tuple[str, ...], Mapping[str, int]]) -> None:
        patients = np.array([counts["patients"] for counts in cells.values()], float)
        values = [sorted({cell[i] for cell in cells}) for i in range(len(names))]
        self._long = max(range(len(names)), key=lambda i: len(values[i]))
        self._others = [i for i in range(len(names)) if i != self._long]
        levels = [(i, value) for i in self._others for value in values[i]]
        if len(levels) > _MOST_VALUES:
            raise UserError(
                f"{', '.join(names[i] for i in self._others)} have {len(levels)} values together; the most is "
                f"{_MOST_VALUES}.",
                "Choose fewer fields, or merge rare values.",
            )
        self._at = {level: number for number, level in enumerate(levels)}
        self._at_long = {value: number for number, value in enumerate(values[self._long])}
        rows = np.repeat(np.arange(len(cells)), len(self._others))
        columns = [self._at[i, cell[i]] for cell in cells for i in self._others]
        others = csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(cells), len(levels)))
        columns = [self._at_long[cell[self._long]] for cell in cells]
        long = csr_matrix((np.ones(len(cells)), (range(len(cells)), columns)), shape=(len(cells), len(self._at_long)))
        weighted = others.multiply(patients[:, None]).tocsr()
        self._of_long = long.T @ patients  # D
        self._shares = (weighted.T @ long).multiply(1 / self._of_long).tocsc()  # B D⁻¹
        schur = (weighted.T @ others - self._shares @ (long.T @ weighted)).toarray()
        # Scaling by the values' patients separates zero eigenvalues from small ones.
        self._scale = 1 / np.sqrt(weighted.T @ np.ones(len(cells)))
        sizes, vectors = np.linalg.eigh(schur * np.outer(self._scale, self._scale))
        null = sizes <= _ZERO
        self._null = vectors[:, null].T * self._scale
        self._root = (vectors[:, ~null] / np.sqrt(sizes[~null])).T * self._scale  # its product with itself is S⁺

    def effective_patients(self, values: tuple[str, ...]) -> float | None:
        """1/(x(X'X)⁺x') of a combination; ``None`` where it is not estimable. Each value occurs."""
        try:
            at = [self._at[i, values[i]] for i in self._others]
            long = self._at_long[values[self._long]]
        except KeyError:  # a value that only occurs with unknown ones
            return None
        column = slice(*self._shares.indptr[long : long + 2])
        rows, shares = self._shares.indices[column], self._shares.data[column]

        def project(onto: np.ndarray) -> np.ndarray:
            return np.asarray(onto[:, at].sum(axis=1) - onto[:, rows] @ shares)

        if np.linalg.norm(project(self._null)) > 1e-6 * np.linalg.norm(self._scale[at]):
            return None
        return float(1 / (1 / self._of_long[long] + np.square(project(self._root)).sum()))


def rounded_down(effective: float) -> str:
    """Effective patients with two decimals, none of which promises more than there is."""
    return f"{math.floor(effective * 100 + _ROUNDING) / 100:g}"


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
