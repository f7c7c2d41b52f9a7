"""Combinations of class, site and other fields: which rows have one, and how it is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from latent_medi.metadata.schema import Schema

Combination = dict[str, str]


@dataclass(frozen=True)
class NotEvaluated:
    """A combination that the split holds out and that nothing can be said about.

    Args:
        combination: Value by field.
        reason: Why, as a clause.
    """

    combination: dict[str, str]
    reason: str


def categorical_fields(schema: Schema) -> tuple[str, ...]:
    """Names of the class and categorical fields of a schema."""
    return tuple(f.name for f in schema.fields if f.kind != "continuous")


def matches(index: pd.DataFrame, combination: Mapping[str, str]) -> np.ndarray:
    """Which rows have all the values of a combination; keys that are no column are ignored. bool [len(index)]."""
    keep = np.ones(len(index), bool)
    for name, value in combination.items():
        if name in index.columns:
            keep &= index[name].to_numpy(dtype=str) == value
    return keep


class Labels:
    """The columns of an index, each turned into codes once, for many questions of which rows have a value.

    Args:
        index: A row per patch.
    """

    def __init__(self, index: pd.DataFrame) -> None:
        self._index = index
        self._columns: dict[str, tuple[np.ndarray, dict[str, int]]] = {}

    def codes(self, name: str) -> tuple[np.ndarray, dict[str, int]]:
        """Code of each row in one column, int [N], and the code of each value that occurs."""
        if name not in self._columns:
            codes, values = pd.factorize(self._index[name].astype(str))
            self._columns[name] = codes, {str(value): i for i, value in enumerate(values)}
        return self._columns[name]

    def having(self, combination: Mapping[str, str]) -> np.ndarray:
        """As :func:`matches`."""
        keep = np.ones(len(self._index), bool)
        for name, value in combination.items():
            if name in self._index.columns:
                codes, values = self.codes(name)
                keep &= codes == values.get(value, -1)
        return keep


def any_match(index: pd.DataFrame, combinations: Sequence[Mapping[str, str]]) -> np.ndarray:
    """Which rows fit at least one combination, bool [len(index)]."""
    keep = np.zeros(len(index), bool)
    for combination in combinations:
        keep |= matches(index, combination)
    return keep


def among(rows: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Those of ``rows`` where the mask over the whole index holds."""
    result: np.ndarray = rows[keep[rows]]
    return result


def describe(combination: Mapping[str, str]) -> str:
    """A combination in words, such as "spindle × birch"; of no value, everything."""
    return " × ".join(combination.values()) or "all patches"
