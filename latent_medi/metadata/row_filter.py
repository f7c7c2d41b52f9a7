"""Row filters: the setting ``only`` of many verbs, values by field, such as ``{class: [LUAD, LUSC]}``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.metadata.schema import Schema

Only = Mapping[str, Sequence[str]]


def only_mask(index: pd.DataFrame, only: Only, where: str) -> np.ndarray:
    """Which rows have one of the listed values in every named column, bool [len(index)].

    Args:
        index: A row per patch or slide.
        only: Values by column: a class or categorical field, or another column of text such as ``slide``.
        where: The data, for messages.

    Raises:
        UserError: A column is absent or of numbers, a value never occurs, no value is listed, or no row is left.
    """
    keep = np.ones(len(index), bool)
    known = [str(name) for name in index.columns if not pd.api.types.is_numeric_dtype(index[name])]
    for name, values in only.items():
        if name not in index.columns:
            raise UserError(f"only names {name!r}, no field of {where}; {nearest(name, known)}.")
        if name not in known:
            raise UserError(f"only names {name!r}, a column of numbers of {where}; it takes classes and categories.")
        if not values:
            raise UserError(f"only.{name} lists no value.", f"only.{name}='[VALUE, …]', or leave it out.")
        column = index[name].astype(str)
        present = set(column.unique())
        if gone := [value for value in values if value not in present]:
            raise UserError(f"No row of {where} has {name} = {gone[0]!r}; {nearest(gone[0], sorted(present))}.")
        keep &= column.isin(list(values)).to_numpy(bool)
    if only and not keep.any():
        raise UserError(f"No row of {where} has {only_text(only)}.", "Name values that occur together.")
    return keep


def only_text(only: Only) -> str:
    """A filter in words, such as "class LUAD or LUSC, and site north"."""
    return ", and ".join(f"{name} {' or '.join(values)}" for name, values in only.items())


def with_values_of(schema: Schema, index: pd.DataFrame) -> Schema:
    """A schema whose vocabularies have only the values that some rows have, in their order: for reports of these rows,
    not for codes.
    """
    present = {f.name: set(index[f.name].unique()) for f in schema.fields if not f.continuous}
    return Schema(
        tuple(
            f if f.continuous else replace(f, values=tuple(v for v in f.values if v in present[f.name]))
            for f in schema.fields
        )
    )
