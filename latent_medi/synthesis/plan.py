"""The plan: a table with a row per combination to generate, made from what the data lack, edited by a person, checked
before use.

Columns: a column per field, ``count``, ``verdict`` and ``seed``. A cell of a field holds a value, ``unknown``, or
    nothing (the model is not told);
a continuous field may also hold ``real``: drawn for each sample from the distribution of the training data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.errors import UserError, nearest
from latent_medi.files import atomic_path
from latent_medi.metadata.audit import audit
from latent_medi.metadata.schema import UNKNOWN_WORD, Field, Schema
from latent_medi.metadata.tables import read_table

REAL = "real"
"""Cell of a continuous field: draw a realistic value for each sample."""
OWN_COLUMNS = ("count", "verdict", "seed")
MOST = 10**8  # more images than any run makes; a slip of the keyboard is caught here


def stable_seed(*parts: Any, bits: int = 31) -> int:
    """A seed that is the same on every machine and in every release: SHA-256 of the parts, cut to ``bits`` bits.

    A spreadsheet keeps integers of 31 bits exactly.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - bits)


def make_plan(
    index: pd.DataFrame,
    schema: Schema,
    goal: str = "fill_unseen",
    per_cell: int = 0,
    seed: int = 0,
    fields: Sequence[str] = (),
    thin_patients: int = 10,
) -> pd.DataFrame:
    """A plan from the rows a model was (or will be) trained on.

    Args:
        index: Those rows of a dataset's index.
        schema: The dataset's schema.
        goal: "fill_unseen": ``per_cell`` for each combination without a patch; "balance": each combination is topped
            up to ``per_cell``, or to the largest one if that is 0; "each": ``per_cell`` for every combination.
        per_cell: Number of patches, see ``goal``.
        seed: Seed of the plan.
        fields: Class and categorical fields to combine; all if empty. Other categorical fields are left to the model,
            continuous ones are "real".
        thin_patients: See :func:`latent_medi.metadata.audit.audit`.

    Returns:
        Columns as in the module's description. Combinations that the data cannot identify are listed with count 0 and
        their verdict.

    Raises:
        UserError: An unknown goal or field, no count, or nothing to combine.
    """
    if goal not in ("fill_unseen", "balance", "each"):
        raise UserError(f"There is no goal {goal!r}; {nearest(goal, ('fill_unseen', 'balance', 'each'))}.")
    if per_cell < 0 or per_cell >= MOST or (per_cell == 0 and goal != "balance"):
        raise UserError(f"per_cell is {per_cell}; the goal {goal!r} needs a number above 0 and below {MOST}.")
    combined = [schema.field(name) for name in fields] or [f for f in schema.fields if not f.continuous]
    combined = sorted(combined, key=lambda f: schema.names.index(f.name))
    if not combined or any(f.continuous for f in combined):
        raise UserError("A plan combines the class and categorical fields; choose at least one and no continuous one.")
    names = [f.name for f in combined]
    cells = [dict(zip(names, values, strict=True)) for values in product(*(f.values for f in combined))]
    # "" and "unknown" are no values: such patches count for no combination.
    seen = index.groupby(names, observed=True).size().to_dict()
    present = [int(seen.get(tuple(cell.values()) if len(names) > 1 else cell[names[0]], 0)) for cell in cells]
    found = audit(index, schema, requested=cells, thin_patients=thin_patients, split=None)["verdicts"]
    target = per_cell or max(present, default=0)
    rows = []
    for cell, there, found_verdict in zip(cells, present, found, strict=True):
        verdict = found_verdict["verdict"]
        if goal == "fill_unseen" and there:
            continue
        count = max(0, target - there) if goal == "balance" else per_cell
        if verdict == "unidentifiable":
            count = 0
        elif goal == "balance" and not count:
            continue
        row = {f.name: cell.get(f.name, REAL if f.continuous else "") for f in schema.fields}
        rows.append({**row, "count": count, "verdict": verdict, "seed": stable_seed(seed, *cell.items())})
    return pd.DataFrame(rows, columns=[*schema.names, *OWN_COLUMNS])


def write_plan(plan: pd.DataFrame, path: str | Path) -> None:
    """Write a plan as .csv or .parquet, atomically."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise UserError(f"The plan {path} must end in .csv or .parquet.")
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".csv":
            plan.to_csv(temporary, index=False, encoding="utf-8")
        else:
            plan.to_parquet(temporary, index=False)


def read_plan(path: str | Path, schema: Schema | None = None) -> pd.DataFrame:
    """Read a plan and check it; see :func:`check_plan`."""
    return check_plan(read_table(path), schema, where=str(path))


def check_plan(
    plan: pd.DataFrame, schema: Schema | None = None, where: str = "The plan", ignore: Sequence[str] = ()
) -> pd.DataFrame:
    """A plan with counts and seeds as integers, everything else as strings, and seeds filled in where they are left
    out.

    Args:
        plan: The table.
        schema: The model's schema; every column and value is looked up in it. Without one, only counts and seeds are
            checked.
        where: How messages call the plan.
        ignore: Field columns that are left out of the result.

    Raises:
        UserError: No count column; a count that is negative, no whole number or too large; an unknown column or value;
            two equal rows.
    """
    columns = [str(c) for c in plan.columns]
    if "count" not in columns:
        raise UserError(f"{where} has no column 'count'; {nearest('count', columns)}.")
    named = [c for c in columns if c not in OWN_COLUMNS and c not in ignore]
    if schema is not None:
        for column in named:
            if column not in schema.names:
                raise UserError(
                    f"{where} has the column {column!r}, no field of the model; {nearest(column, schema.names)}.",
                    f"Rename it, or leave it out knowingly with ignore=[{column}].",
                )
    cells = {column: [_cell(value) for value in plan[column]] for column in named}
    counts = [_whole(value, MOST, f"{where}, row {i + 1}: count") for i, value in enumerate(plan["count"])]
    if sum(counts) >= MOST:
        raise UserError(f"{where} asks for {sum(counts)} patches; the most is {MOST - 1}.", "Is a count mistyped?")
    seeds = []
    for i in range(len(plan)):
        given = _cell(plan["seed"].iloc[i]) if "seed" in columns else ""
        row = [(column, cells[column][i]) for column in named]
        seeds.append(_whole(given, 2**53, f"{where}, row {i + 1}: seed") if given else stable_seed(0, *row))
    if schema is not None:
        for column in named:
            for i, cell in enumerate(cells[column]):
                try:
                    _check_cell(schema.field(column), cell)
                except UserError as error:
                    raise UserError(f"{where}, row {i + 1}: {error.message}", error.hint) from None
    seen: dict[tuple, int] = {}
    for i in range(len(plan)):
        first = seen.setdefault((seeds[i], *(cells[column][i] for column in named)), i)
        if first != i:
            raise UserError(
                f"{where}: rows {first + 1} and {i + 1} are the same, and would give the same images twice.",
                "Raise the count of one, or give them different seeds.",
            )
    verdicts = [_cell(value) for value in plan["verdict"]] if "verdict" in columns else [""] * len(plan)
    return pd.DataFrame({**cells, "count": counts, "verdict": verdicts, "seed": seeds})


def _cell(value: Any) -> str:
    return "" if value is None or value != value else str(value).strip()


def _whole(value: Any, bound: int, what: str) -> int:
    text = _cell(value)
    try:
        number = float(text)  # a spreadsheet may have written 100 as 100.0
        whole = int(text) if text.lstrip("+-").isdigit() else int(number)
    except (ValueError, OverflowError):
        raise UserError(f"{what} is {text!r}, which is no whole number.") from None
    if whole != number or not 0 <= whole < bound:
        raise UserError(f"{what} is {text}; it is a whole number from 0 to {bound - 1}.")
    return whole


def _check_cell(known: Field, cell: str) -> None:
    if not cell:
        return
    if known.continuous and cell == REAL:
        if not known.quantiles and known.missing < 1:
            raise UserError(f"Field {known.name!r} cannot be {REAL!r}: the model's schema has no quantiles for it.")
        return
    known.code(cell)


@dataclass(frozen=True)
class Sample:
    """One image to generate.

    Args:
        row: Row of the plan, from 0.
        number: Which of the row's images, from 0.
        seed: Seed of its noise and of drawn values, 63 bits.
        fields: What the model is told: value by field name; a field not given is absent.
    """

    row: int
    number: int
    seed: int
    fields: dict[str, str | float]


def sample_at(plan: pd.DataFrame, schema: Schema, position: int, ends: np.ndarray) -> Sample:
    """The ``position``-th image of a checked plan.

    Args:
        plan: From :func:`check_plan`.
        schema: The model's schema.
        position: From 0 to the sum of counts - 1.
        ends: Cumulative sum of the plan's counts, int64.
    """
    row = int(np.searchsorted(ends, position, side="right"))
    number = position - int(ends[row] - plan["count"].iloc[row])
    seed = stable_seed(int(plan["seed"].iloc[row]), number, bits=63)
    fields: dict[str, str | float] = {}
    for known in schema.fields:
        cell = plan[known.name].iloc[row] if known.name in plan.columns else ""
        if cell:
            fields[known.name] = _drawn(known, seed) if known.continuous and cell == REAL else cell
    return Sample(row, number, seed, fields)


def _drawn(known: Field, seed: int) -> str | float:
    """A value of a continuous field as the training data have it: missing as often, and spread like their quantiles."""
    # The name keeps two fields of one sample independent of each other.
    missing, position = np.random.default_rng(stable_seed(known.name, seed)).random(2)
    if missing < known.missing or not known.quantiles:
        return UNKNOWN_WORD
    return float(np.interp(position, np.linspace(0.0, 1.0, len(known.quantiles)), known.quantiles))
