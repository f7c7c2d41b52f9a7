"""The plan: a table with a row per combination to generate, which a person may edit. It is checked before use.

Columns: one per field, ``count``, ``verdict`` and ``seed``. A field holds a value, ``unknown``, or nothing (the model
is not conditioned on it). A continuous field may also hold ``real``: drawn for each sample from the distribution of the
training data. Two more columns hold that distribution, such as ``age_quantiles`` ("41 55 62 70 88": evenly spaced
quantiles, from the least to the largest value) and ``age_unknown`` (share of samples without a value, 0 to 1; empty
means none). Where both are empty or absent, the distribution is that of the model's schema. A third column,
``age_from``, informs the reader whose values these are (``cell``, ``class`` or ``all``); the program ignores it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import atomic_path, check_file
from latent_medi.metadata.schema import UNKNOWN_WORD, Field, Schema
from latent_medi.metadata.tables import read_table, write_for_people, written_for_people
from latent_medi.metadata.tcga_cancers import with_known_names

REAL = "real"
"""Entry of a continuous field: draw a realistic value for each sample."""
OWN_COLUMNS = ("count", "verdict", "seed")
QUANTILES_OF, UNKNOWN_OF = "_quantiles", "_unknown"
"""Endings of the columns that define ``real`` in a row."""
DRAWN_FROM = "_from"
"""Ending of the column that names whose values these are: those of the row's combination, its class, or all."""
MOST = 10**8  # more images than any run generates; catches typing errors


def stable_seed(*parts: Any, bits: int = 31) -> int:
    """A seed that is the same on every machine and in every release: SHA-256 of the parts, cut to ``bits`` bits.

    A spreadsheet keeps integers of 31 bits exactly.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - bits)


def check_plan_file(path: str | Path) -> Path:
    """The path of a plan to write. It may replace an older plan, and no other file.

    Raises:
        UserError: It cannot be written, or another file has that path.
    """
    return check_file(path, "plan", rb"PAR1|[^\n]*\bcount\b")


def write_plan(plan: pd.DataFrame, path: str | Path) -> None:
    """Write a plan as .csv or .parquet, atomically."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise UserError(f"The plan {path} must end in .csv or .parquet.")
    check_plan_file(path)
    if path.suffix.lower() == ".csv":
        write_for_people(plan, path)
        return
    with atomic_path(path) as temporary:
        plan.to_parquet(temporary, index=False)


def read_plan(path: str | Path, schema: Schema | None = None) -> pd.DataFrame:
    """Read a plan and check it; see :func:`check_plan`."""
    table = read_table(path)
    if Path(path).suffix.lower() == ".csv":
        table = written_for_people(table)
    return check_plan(table, schema, where=str(path))


def check_plan(
    plan: pd.DataFrame, schema: Schema | None = None, where: str = "The plan", ignore: Sequence[str] = ()
) -> pd.DataFrame:
    """A plan with counts and seeds as integers, everything else as strings, and missing seeds filled in. The columns
    that define ``real`` come last, without :data:`DRAWN_FROM`.

    Args:
        plan: The table.
        schema: The model's schema, which must have every value and every column that has one; a class may have TCGA's
            other name, of a project or cancer. Without a schema, only counts and seeds are checked.
        where: Name of the plan in messages.
        ignore: Fields that are left out of the result.

    Raises:
        UserError: No count column; a count that is negative, no whole number or too large; an unknown column or value;
            quantiles that do not rise, a share outside 0 to 1; two equal rows.
    """
    text = plan.rename(columns=str).map(_cell).reset_index(drop=True)
    columns = list(text.columns)
    if "count" not in columns:
        raise UserError(f"{where} has no column 'count'; {nearest('count', columns)}.")
    drawn = _columns_on_real(columns, schema)
    named = [c for c in columns if c not in OWN_COLUMNS and c not in ignore and c not in drawn]
    extras = [c for c, field in drawn.items() if field not in ignore and c != field + DRAWN_FROM]
    if schema is not None:  # a field that every row leaves open asks nothing of a model that does not know it
        named = [c for c in named if c in schema.names or text[c].any()]
    if schema is not None and (unknown := [c for c in named if c not in schema.names]):
        raise UserError(
            f"{where} has the column {unknown[0]!r}, no field of the model; {nearest(unknown[0], schema.names)}.",
            f"Rename it, or leave it out knowingly with ignore=[{unknown[0]}].",
        )
    if schema is not None and (known := schema.class_field) is not None and known.name in named:
        text[known.name] = with_known_names(text[known.name], known.values, where)
    counts = [whole_number(value, MOST, f"{where}, row {i}: count") for i, value in enumerate(text["count"], 1)]
    if sum(counts) >= MOST:
        raise UserError(f"{where} asks for {sum(counts)} patches; the most is {MOST - 1}.", "Is a count mistyped?")
    seeds = []
    for i, row in enumerate(text.to_dict("records"), 1):
        content = [(c, row[c]) for c in named] + [(c, row[c]) for c in sorted(extras) if row[c]]
        seed = row.get("seed", "")
        seeds.append(whole_number(seed, 2**53, f"{where}, row {i}: seed") if seed else stable_seed(0, *content))
        if schema is not None:
            _check_row(row, [schema.field(name) for name in named], schema, f"{where}, row {i}")
    verdicts = text["verdict"] if "verdict" in columns else ""
    result = text[named].assign(count=counts, verdict=verdicts, seed=seeds)
    result[extras] = text[extras]
    content_of = result[["seed", *named, *extras]]
    if (same := content_of.duplicated()).any():
        second = int(same.to_numpy().argmax())
        first = int((content_of == content_of.iloc[second]).all(axis=1).to_numpy().argmax())
        raise UserError(
            f"{where}: rows {first + 1} and {second + 1} are the same, and would give the same images twice.",
            "Raise the count of one, or give them different seeds.",
        )
    return result


def _columns_on_real(columns: Sequence[str], schema: Schema | None) -> dict[str, str]:
    """The columns that define ``real``, each with its field; a field with such a name stays a field."""
    found = {}
    for column in columns:
        for ending in (QUANTILES_OF, UNKNOWN_OF, DRAWN_FROM):
            name = column.removesuffix(ending)
            if name == column or name not in columns:
                continue
            if schema is None or (
                column not in schema.names and (name not in schema.names or schema.field(name).continuous)
            ):
                found[column] = name
    return found


def _on_real(name: str, row: Mapping[Hashable, Any] | pd.Series, schema: Schema) -> tuple[str, str]:
    """Quantiles and share of unknown values that a row gives for a field's ``real``, each maybe empty."""
    columns = (name + QUANTILES_OF, name + UNKNOWN_OF)
    quantiles, unknown = (row[c] if c in row and c not in schema.names else "" for c in columns)
    return quantiles, unknown


def _cell(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip()


def whole_number(value: Any, bound: int, what: str) -> int:
    """A whole number from 0 to ``bound`` - 1 from a table's entry; ``100.0`` is 100.

    Args:
        value: The entry.
        bound: The least number that is too large.
        what: Name of the entry in messages.

    Raises:
        UserError: It is empty, has a fraction or an exponent, is no number, or is out of bounds.
    """
    text = _cell(value)
    try:
        number = float(text)
        whole = int(text) if text.lstrip("+-").isdigit() else int(number)
    except (ValueError, OverflowError):
        raise UserError(f"{what} is {text!r}, which is no whole number.") from None
    if whole != number or not 0 <= whole < bound:
        raise UserError(f"{what} is {text}; it is a whole number from 0 to {bound - 1}.")
    if "e" in text.lower() or "_" in text:  # a spreadsheet that writes 1E+05 may have rounded
        raise UserError(f"{what} is {text}; write it in digits alone.", f"Is {whole} meant?")
    return whole


def _check_row(row: Mapping[Hashable, Any], fields: Sequence[Field], schema: Schema, where: str) -> None:
    try:
        for known in fields:
            _check_cell(known, row[known.name], *_on_real(known.name, row, schema))
    except UserError as error:
        raise UserError(f"{where}: {error.message}", error.hint) from None


def _check_cell(known: Field, cell: str, quantiles: str, unknown: str) -> None:
    if not cell:
        return
    if known.continuous:
        values, missing = _distribution(known, quantiles, unknown)
        if cell == REAL and not values and missing < 1:
            raise UserError(f"Field {known.name!r} cannot be {REAL!r}: the model's schema has no quantiles for it.")
        if cell == REAL:
            return
    known.code(cell)


def _distribution(known: Field, quantiles: str, unknown: str) -> tuple[tuple[float, ...], float]:
    """Quantiles and share of unknown values of ``real``; the schema's where a row has neither.

    Raises:
        UserError: Quantiles that do not rise, or a share outside 0 to 1.
    """
    values = known.quantiles
    if quantiles:
        values = tuple(_number(word, known.name + QUANTILES_OF) for word in quantiles.split())
        if any(a > b for a, b in itertools.pairwise(values)):
            raise UserError(
                f"{known.name}{QUANTILES_OF} is {quantiles!r}; the numbers run from the least to the largest."
            )
    missing = 0.0 if quantiles else known.missing
    if unknown:
        missing = _number(unknown, known.name + UNKNOWN_OF)
        if not 0 <= missing <= 1:
            raise UserError(f"{known.name}{UNKNOWN_OF} is {unknown}; it is a share from 0 to 1.")
    return values, missing


def _number(word: str, what: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{what} holds {word!r}, which is no number.", "Separate numbers by blanks, with a decimal point."
        )
    return number


@dataclass(frozen=True)
class Sample:
    """One image to generate.

    Args:
        row: Row of the plan, from 0.
        number: Which of the row's images, from 0.
        seed: Seed of its noise and of drawn values, 63 bits.
        fields: Conditions, value by field; fields that the model is not conditioned on are absent.
    """

    row: int
    number: int
    seed: int
    fields: dict[str, str | float]


def sample_at(plan: pd.DataFrame, schema: Schema, position: int, ends: np.ndarray) -> Sample:
    """The ``position``-th image of a checked plan.

    Args:
        plan: From :func:`check_plan`, rows numbered from 0.
        schema: The model's schema.
        position: From 0 to the sum of counts - 1.
        ends: Cumulative sum of the plan's counts, int64.
    """
    row = int(np.searchsorted(ends, position, side="right"))
    planned = plan.iloc[row]
    number = position - int(ends[row] - planned["count"])
    seed = stable_seed(int(planned["seed"]), number, bits=63)
    fields: dict[str, str | float] = {}
    for known in schema.fields:
        cell = planned.get(known.name, "")
        if known.continuous and cell == REAL:
            quantiles, unknown = _on_real(known.name, planned, schema)
            fields[known.name] = _drawn(known, seed, *_distribution(known, quantiles, unknown))
        elif cell:
            fields[known.name] = cell
    return Sample(row, number, seed, fields)


def _drawn(known: Field, seed: int, quantiles: Sequence[float], share_missing: float) -> str | float:
    """A random value of a continuous field, with the distribution of the quantiles, or "unknown"."""
    # With the name, two fields of one sample are independent of each other.
    missing, position = np.random.default_rng(stable_seed(known.name, seed)).random(2)
    if missing < share_missing or not quantiles:
        return UNKNOWN_WORD
    return float(np.interp(position, np.linspace(0.0, 1.0, len(quantiles)), quantiles))
