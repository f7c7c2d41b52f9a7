"""The distribution of ``real`` in each row of a plan: that of a continuous field among the patients of the row's
combination. It is written into the row, so that the plan needs no dataset.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from latent_medi.metadata.schema import QUANTILES, Schema
from latent_medi.planning.plan import DRAWN_FROM, QUANTILES_OF, UNKNOWN_OF

LEVELS = ("cell", "class", "all")
"""Groups of patients whose values are drawn, the narrowest first."""


def real_values(
    index: pd.DataFrame, schema: Schema, table: pd.DataFrame, combined: Sequence[str], patients: int
) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """Quantiles and shares of unknown values for the rows of a plan.

    Quantiles are those of the rows of the index with the same combination, if at least ``patients`` patients there
    have a value; otherwise of those of the same class, however few; of all only if no patient of the class has one, or
    no class is combined. The share of rows without a value likewise is that of the narrowest group with enough
    patients.

    Args:
        index: Patient and fields, NaN where a continuous field has no value.
        schema: Its fields.
        table: The plan's rows; the combined fields are read.
        combined: Class and categorical fields that the plan combines.
        patients: Patients that the distribution of a combination needs.

    Returns:
        Columns for the plan, such as ``age_quantiles`` (21 numbers of 6 digits; ``""`` where nobody has a value),
        ``age_unknown`` and ``age_from`` (one of :data:`LEVELS`); and by field, how many rows draw from which of them.
    """
    known_class = schema.class_field
    own = [known_class.name] if known_class is not None and known_class.name in combined else []
    keys = {"cell": [*combined], "class": own, "all": []}
    if own in ([], [*combined]):
        del keys["class"]
    # A few patients of a class represent its ages better than all others do, also where the class is the combination.
    least = {level: patients if level == "cell" and own != [*combined] else 1 for level in keys}
    columns: dict[str, list[str]] = {}
    levels: dict[str, dict[str, int]] = {}
    for field in schema.fields:
        if not field.continuous:
            continue
        given = index[index[field.name].notna()]
        values = {level: _quantiles(given, field.name, names, least[level]) for level, names in keys.items()}
        shares = {level: _shares(index, field.name, names, least[level]) for level, names in keys.items()}
        columns[field.name + QUANTILES_OF] = quantiles = []
        columns[field.name + UNKNOWN_OF] = unknown = []
        columns[field.name + DRAWN_FROM] = drawn_from = []
        levels[field.name] = dict.fromkeys(LEVELS, 0)
        for row in table[list(combined)].to_dict("records"):
            at = {level: tuple(row[name] for name in names) for level, names in keys.items()}
            level = next((level for level in keys if at[level] in values[level]), "all")
            levels[field.name][level] += 1
            drawn_from.append(level)
            quantiles.append(values[level].get(at[level], ""))
            unknown.append(next(shares[level][at[level]] for level in keys if at[level] in shares[level]))
    return columns, levels


def _enough(index: pd.DataFrame, names: list[str], patients: int) -> dict[tuple[str, ...], pd.DataFrame]:
    """The rows by combination, where there are enough patients; without names, all rows however few."""
    if not names:
        return {(): index} if len(index) else {}
    counts = index[[*names, "patient"]].drop_duplicates().groupby(names, observed=True).size()
    wanted = {key if isinstance(key, tuple) else (key,) for key in counts.index[counts >= patients]}
    groups = index.groupby(names, observed=True)
    return {key: rows for key, rows in groups if key in wanted}


def _quantiles(given: pd.DataFrame, name: str, names: list[str], patients: int) -> dict[tuple[str, ...], str]:
    at = np.linspace(0, 1, QUANTILES)
    return {
        key: " ".join(f"{q:.6g}" for q in np.quantile(rows[name].to_numpy(dtype=float), at))
        for key, rows in _enough(given, names, patients).items()
    }


def _shares(index: pd.DataFrame, name: str, names: list[str], patients: int) -> dict[tuple[str, ...], str]:
    return {key: f"{rows[name].isna().mean():.4g}" for key, rows in _enough(index, names, patients).items()}
