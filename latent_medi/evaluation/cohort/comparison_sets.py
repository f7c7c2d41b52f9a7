"""Which patches are held against which: combinations, and for each side equally many patches in the reference's mix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from latent_medi.evaluation.cohort.combinations import Combination, matches
from latent_medi.evaluation.cohort.matching import Matched, strata
from latent_medi.evaluation.cohort.study import NOT_CONDITIONED, Study, SyntheticSet

FLOOR = "floor"
MIN_SAMPLES = 20
"""A cell with fewer patches than this on a side is listed, not judged."""
MOST_APART = 0.2
"""A side whose mix of sites, or of another field's values, is further than this from the reference's (total variation,
0 to 1) is listed, not judged."""


@dataclass
class Comparison:
    """One comparison: a reference and, per arm and for the floor, equally many samples.

    Args:
        combination: What the cell shows.
        reference: Rows of the real index.
        rows: Rows by arm (of its own index) or floor (of the real index).
        mismatch: Share of each sample in a wrong stratum, see :class:`Matched`.
        skipped: Why there is no number, by arm; "" as key stands for the whole cell.
    """

    combination: Combination
    reference: np.ndarray
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    mismatch: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def held_out_comparisons(study: Study, seed: int) -> list[Comparison]:
    """A cell per held-out combination."""
    return [comparison_for(study, c, seed + i) for i, c in enumerate(study.held_out)]


def class_comparisons(study: Study, seed: int) -> list[Comparison]:
    """A cell per class, over all sites with the test patches' own mix."""
    return [comparison_for(study, {study.class_field: v}, seed + i) for i, v in enumerate(study.classes)]


def field_comparisons(study: Study, fields: Sequence[str], seed: int) -> list[Comparison]:
    """A cell per combination of some fields that test patches have, with the test patches' own mix of the others."""
    table = study.index.iloc[study.reference][list(fields)].astype(str).drop_duplicates()
    values = {name: {v: i for i, v in enumerate(study.real.schema.field(name).values)} for name in fields}
    rows = [dict(zip(fields, row, strict=True)) for row in table.itertuples(index=False, name=None)]
    known = [row for row in rows if all(value in values[name] for name, value in row.items())]
    known.sort(key=lambda row: [values[name][value] for name, value in row.items()])
    return [comparison_for(study, row, seed + i) for i, row in enumerate(known)]


def comparison_for(study: Study, combination: Combination, seed: int) -> Comparison:
    """Choose rows: an arm follows the reference's mix of the fields that the arm knows and the cell leaves open."""
    rng = np.random.default_rng([seed, 1])
    cell = Comparison(combination, study.rows_of(study.reference, combination))
    if len(cell.reference) < MIN_SAMPLES:
        cell.skipped[""] = f"{len(cell.reference)} reference patches, fewer than {MIN_SAMPLES}"
        return cell
    open_fields = [f for f in study.categorical() if f not in combination]
    sides = {arm.name: _matching(cell, arm, open_fields) for arm in study.synthetic.values()}
    sides[FLOOR] = study.index, study.rows_of(study.probe, combination), open_fields
    pools: dict[str, Matched] = {}
    for name, (index, rows, fields) in sides.items():
        pool = Matched(rows, strata(index, rows, fields), strata(study.index, cell.reference, fields))
        if pool.largest < MIN_SAMPLES:
            cell.skipped[name] = f"{pool.largest} samples match, fewer than {MIN_SAMPLES}"
            continue
        drawn, _ = pool.draw(pool.largest, np.random.default_rng([seed, 2]))
        if apart := _apart(index.iloc[drawn], study.index.iloc[cell.reference], fields):
            whose = "of other real patients" if name == FLOOR else "of its samples"
            cell.skipped[name] = f"{apart} {whose}"
        else:
            pools[name] = pool
    if not pools:
        return cell
    n = min(pool.largest for pool in pools.values())
    for name, pool in pools.items():
        cell.rows[name], cell.mismatch[name] = pool.draw(n, rng)
    return cell


def _matching(
    cell: Comparison, arm: SyntheticSet, open_fields: Sequence[str]
) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """An arm's index, its rows that show the cell, and the open fields that these were given: others cannot match."""
    known = {k: v for k, v in cell.combination.items() if k in arm.fields}
    rows = np.flatnonzero(matches(arm.index, known))
    fields = [f for f in open_fields if f in arm.fields and set(arm.index[f].astype(str).iloc[rows]) - NOT_CONDITIONED]
    return arm.index, rows, fields


def _apart(theirs: pd.DataFrame, reference: pd.DataFrame, fields: Sequence[str]) -> str:
    """Where a side's mix is too far from the reference's, field by field; empty if nowhere. Patches of which a field is
    not known say nothing of it.
    """
    for name in fields:
        wanted, found = (_shares(table[name]) for table in (reference, theirs))
        short = wanted.sub(found, fill_value=0.0)
        if wanted.empty or short.abs().sum() / 2 <= MOST_APART + 1e-9:
            continue
        value = str(short.idxmax())
        return f"{name} is {value} in {wanted[value]:.0%} of the reference, in {found.get(value, 0.0):.0%}"
    return ""


def _shares(column: pd.Series) -> pd.Series:
    values = column.astype(str)
    return values[~values.isin(NOT_CONDITIONED)].value_counts(normalize=True)
