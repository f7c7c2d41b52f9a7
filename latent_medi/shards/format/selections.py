"""Selections: columns of the index that say which patches were selected. No patch is moved or removed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest

if TYPE_CHECKING:
    from latent_medi.shards.dataset import PatchDataset

SELECTED_PREFIX = "selected_"
SELECTION_PARTS = ("", "_control", "_score")
"""Endings of the columns ``selected_<name>``: the choice, a random one of the same size, and the score it ranks by."""


def check_selection_name(name: str) -> None:
    """Refuse a name that cannot be a selection's.

    Raises:
        UserError: It holds other characters than letters, digits and underscores, or its column would have the name of
            another selection's.
    """
    if not re.fullmatch("[A-Za-z0-9_]+", name):
        raise UserError(f"A selection's name has letters, digits and underscores only, not {name!r}.")
    for part in SELECTION_PARTS:
        if part and name.endswith(part):
            raise UserError(f"A selection cannot be called {name!r}: names that end in {part!r} are its own columns.")


def selection_columns(name: str, columns: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """The columns of a selection by the names that the index gives them.

    Args:
        name: Name of the selection.
        columns: By entry of ``SELECTION_PARTS``, in the index's order.
        count: Rows of the dataset.

    Raises:
        UserError: A name that cannot be used, or columns that do not fit.
    """
    check_selection_name(name)
    if "" not in columns or not set(columns) <= set(SELECTION_PARTS):
        raise UserError(f"A selection has the columns {list(SELECTION_PARTS)}, not {sorted(columns)}.")
    for part, column in columns.items():
        if len(column) != count:
            where = f"Column {part!r} of the selection {name!r}"
            raise UserError(f"{where} has {len(column)} rows; the dataset has {count}.")
    types = {part: np.float64 if part == "_score" else bool for part in SELECTION_PARTS}
    return {f"{SELECTED_PREFIX}{name}{part}": np.asarray(column, types[part]) for part, column in columns.items()}


def column_hash(column: pd.Series) -> str:
    """Hex SHA-256 of a column's values in order."""
    return hashlib.sha256("\n".join(map(str, column.tolist())).encode()).hexdigest()


def recorded_selections(info: Mapping[str, Any], index: pd.DataFrame) -> dict[str, Any]:
    """The selections with each column's hash and, for a choice, its number of patches."""
    recorded = {}
    for name, entry in info.get("selections", {}).items():
        columns = {
            label: {"sha256": column_hash(index[label])}
            | ({"patches": int(index[label].sum())} if index[label].dtype == bool else {})
            for label in entry["columns"]
        }
        recorded[name] = {"recipe": entry["recipe"], "columns": columns, "result": entry["result"]}
    return recorded


def selected_mask(dataset: PatchDataset, column: str) -> np.ndarray:
    """The rows that a selection's choice or control holds, bool [len(dataset)].

    Args:
        dataset: The dataset.
        column: ``selected_<name>`` or ``selected_<name>_control``.

    Raises:
        UserError: There is no such column.
    """
    known = [c for c in dataset.index.columns if c.startswith(SELECTED_PREFIX) and dataset.index[c].dtype == bool]
    if column not in known:
        problem = f"{dataset.folder} has no selection {column!r}; {nearest(column, known)}."
        raise UserError(problem, "`latent-medi select` makes one; give the name of its column.")
    return dataset.index[column].to_numpy(bool)


def choice_order(
    index: pd.DataFrame, folder: str, name: str, choice: Literal["selected", "random"], seed: int
) -> np.ndarray:
    """Rows of a synthetic dataset in the order in which a training set takes them, int64.

    Args:
        index: The index, or some of its rows.
        folder: Its folder, for the message.
        name: Name of a selection; "" for every row in random order.
        choice: "selected" takes the selection by its score, lowest first; "random" its control, which has as many, or
            without one every row, in random order.
        seed: Seed of the random order.

    Raises:
        UserError: There is no such selection.
    """
    column = f"{SELECTED_PREFIX}{name}"
    if name and column not in index:
        known = [c.removeprefix(SELECTED_PREFIX) for c in index if c.startswith(SELECTED_PREFIX)]
        known = [c for c in known if not c.endswith(SELECTION_PARTS[1:])]
        raise UserError(
            f"{folder} has no selection {name!r}; {nearest(name, known)}.", "Make one with `latent-medi select`."
        )
    if name and choice == "selected":
        chosen = np.flatnonzero(index[column].to_numpy(bool))
        if f"{column}_score" in index:
            scores = index[f"{column}_score"].to_numpy(float)[chosen]
            chosen = chosen[np.argsort(scores, kind="stable")]  # NaN goes last
        return chosen
    control = f"{column}_control"
    others = np.flatnonzero(index[control].to_numpy(bool)) if name and control in index else np.arange(len(index))
    return np.random.default_rng([seed, 41]).permutation(others)
