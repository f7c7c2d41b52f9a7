"""Inputs of a plan: the rows that a model was trained on, and the table of a target."""

from __future__ import annotations

import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.metadata.schema import UNKNOWN, Schema
from latent_medi.metadata.table_index import is_table, map_sites, read_table_index
from latent_medi.metadata.tables import read_table
from latent_medi.planning.apportion import Combination
from latent_medi.planning.plan import MOST, whole_number
from latent_medi.planning.settings import PlanSettings
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset


def read_rows(settings: PlanSettings) -> tuple[pd.DataFrame, Schema]:
    """The rows that the model has seen, and their schema.

    Raises:
        UserError: The data cannot be read, or have no such split, part or field.
    """
    index, schema = _read_table(settings) if is_table(settings.data) else _read_dataset(settings)
    if not len(index):
        raise UserError(f"{settings.data} has no row with {settings.split} = {settings.split_value}.")
    if settings.tss_table:
        index, schema, _ = map_sites(index, schema, settings.site_field, settings.tss_table)
    return index, schema


def _read_dataset(settings: PlanSettings) -> tuple[pd.DataFrame, Schema]:
    dataset = PatchDataset.open(settings.data)
    rows = dataset.rows({SPLIT_PREFIX + settings.split: settings.split_value} if settings.split else None)
    return dataset.index.iloc[rows], dataset.schema


def _read_table(settings: PlanSettings) -> tuple[pd.DataFrame, Schema]:
    named = [*settings.fields, *settings.only]
    if settings.target:
        named += [name for name in read_table(settings.target).columns if name != "count"]
    taken = (settings.class_field, settings.site_field, *settings.continuous)
    further = [name for name in dict.fromkeys(named) if name not in taken]
    index, schema = read_table_index(
        settings.data,
        settings.class_field,
        settings.site_field,
        further,
        settings.patient_field,
        settings.slide_field,
        settings.continuous,
        bool(settings.tss_table),
    )
    if settings.split:
        table, column = read_table(settings.data), SPLIT_PREFIX + settings.split
        if column in table.columns:
            index = index[(table[column] == settings.split_value).to_numpy()]
        elif settings.split != "main":
            names = [c.removeprefix(SPLIT_PREFIX) for c in table.columns if c.startswith(SPLIT_PREFIX)]
            raise UserError(f"{settings.data} has no column {column!r}; {nearest(settings.split, names)}.")
    return index, schema


def read_target(path: str, schema: Schema) -> tuple[list[str], dict[Combination, int]]:
    """The fields of a target table in the schema's order, and the number of images to reach by combination.

    Raises:
        UserError: The table has no count, an unknown field or value, or a combination twice.
    """
    table, where = read_table(path), f"The target {path}"
    columns = [str(c) for c in table.columns]
    if "count" not in columns:
        raise UserError(f"{where} has no column 'count'; {nearest('count', columns)}.")
    for name in columns:
        if name == "count":
            continue
        if name not in schema.names:
            raise UserError(f"{where} has the column {name!r}, no field of the data; {nearest(name, schema.names)}.")
        if schema.field(name).continuous:
            raise UserError(f"{where} has the continuous field {name!r}; it counts classes and categories.")
    names = [f.name for f in schema.fields if f.name in columns]
    if not names or not len(table):
        raise UserError(f"{where} has no {'row' if names else 'column of a field'}.", "class,site,count")
    levels: dict[Combination, int] = {}
    first: dict[Combination, int] = {}
    for i, row in enumerate(table.to_dict("records"), 1):
        combination = tuple(row[name] for name in names)
        for name, value in zip(names, combination, strict=True):
            try:
                known = schema.field(name).code(value) != UNKNOWN
            except UserError as error:
                raise UserError(f"{where}, row {i}: {error.message}", error.hint) from None
            if not known:
                raise UserError(f"{where}, row {i}: {name} is {value!r}, which is no known value.")
        levels[combination] = whole_number(row["count"], MOST, f"{where}, row {i}: count")
        if (before := first.setdefault(combination, i)) != i:
            raise UserError(f"{where}: rows {before} and {i} are of the same combination, {' × '.join(combination)}.")
    return names, levels
