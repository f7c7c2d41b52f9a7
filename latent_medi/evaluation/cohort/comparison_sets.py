"""Which patches are compared: per combination a reference, and patches of each source in its mix. How many and which
these are depends on the source and the real patches alone, never on another synthetic set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd

from latent_medi.evaluation.cohort.combinations import Combination
from latent_medi.evaluation.cohort.matching import Matched, strata
from latent_medi.evaluation.cohort.study import NOT_CONDITIONED, Study, SyntheticSet

REAL = "real"
"""The source of further real patches; the other sources are the synthetic sets, by their names."""
Part = Literal["test", "train"]
"""What is the reference: test patients, or the images that models were trained on."""
MIN_SAMPLES = 20
"""With fewer patches than this in the reference or the source, there is no distance."""
MAX_MISMATCH = 0.2
"""Nor is there where the source's mix of a field's values is further than this from the reference's (total variation,
0 to 1)."""


def seed_name(source: str) -> bytes:
    """What the name of a source adds to a seed, so that the other sources do not change its draw."""
    return b"floor" if source == REAL else source.encode()


@dataclass
class Comparison:
    """A reference and the patches of each source.

    Args:
        combination: Values that all patches have.
        reference: Rows of the real index.
        rows: Rows by source: of the synthetic set's index, or of the real index.
        mismatch: Share of each source's rows in a wrong stratum, see :class:`Matched`.
        skipped: Why a source is missing; the key "" stands for all.
        unmatched: Fields by source that its rows do not follow the reference in, see :func:`comparison_for`.
    """

    combination: Combination
    reference: np.ndarray
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    mismatch: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, list[str]] = field(default_factory=dict)


def held_out_comparisons(study: Study, seed: int) -> list[Comparison]:
    """One per held-out combination."""
    return [comparison_for(study, c, seed + i) for i, c in enumerate(study.held_out)]


def class_comparisons(study: Study, seed: int, part: Part = "test") -> list[Comparison]:
    """One per class, over all sites in the reference's mix."""
    return [comparison_for(study, {study.class_field: v}, seed + i, part) for i, v in enumerate(study.classes)]


def field_comparisons(study: Study, fields: Sequence[str], seed: int, part: Part = "test") -> list[Comparison]:
    """One per combination of some fields that the reference has, in the reference's mix of the other fields."""
    table = study.index.iloc[_reference(study, part)][list(fields)].drop_duplicates().astype(str)
    values = {name: {v: i for i, v in enumerate(study.real.schema.field(name).values)} for name in fields}
    rows = [dict(zip(fields, row, strict=True)) for row in table.itertuples(index=False, name=None)]
    known = [row for row in rows if all(value in values[name] for name, value in row.items())]
    known.sort(key=lambda row: [values[name][value] for name, value in row.items()])
    return [comparison_for(study, row, seed + i, part) for i, row in enumerate(known)]


def comparison_for(study: Study, combination: Combination, seed: int, part: Part = "test") -> Comparison:
    """Choose the rows of one combination. A source follows the reference's mix of the other fields, as far as its model
    was conditioned on them. With test patients as the reference, a synthetic set has at most as many patches as match
    of other real patients, or as the reference has where there are none.

    No sample can follow a field of which training lacks the values of more than a fifth of the reference, such as the
    site where test patients are of other hospitals: there the samples are those that have such values of these fields
    as training patches of their class have. Of the training images further real patients follow what they can.
    """
    result = Comparison(combination, study.rows_of(_reference(study, part), combination))
    if len(result.reference) < MIN_SAMPLES:
        result.skipped[""] = f"{len(result.reference)} reference patches, fewer than {MIN_SAMPLES}"
        return result
    if _of_one_patient(study, result.reference):
        result.skipped[""] = "the reference patches are of one patient"
        return result
    other_fields = [f for f in study.categorical() if f not in combination]
    sources = {s.name: _candidates(study, combination, s, other_fields, result) for s in study.synthetic.values()}
    real = _further_real(study, combination, other_fields, result, part)
    if part == "test" or len(real[1]):  # test patients need not have what training has
        sources[REAL] = real
    pools: dict[str, Matched] = {}
    for name, (index, rows, fields) in sources.items():
        pool = Matched(rows, strata(index, rows, fields), strata(study.index, result.reference, fields))
        if pool.largest < MIN_SAMPLES:
            result.skipped[name] = f"{pool.largest} samples match, fewer than {MIN_SAMPLES}"
            continue
        drawn, _ = pool.draw(pool.largest, np.random.default_rng([seed, 2]))
        if mismatch := _mismatch(index.iloc[drawn], study.index.iloc[result.reference], fields):
            whose = "of other real patients" if name == REAL else "of its samples"
            result.skipped[name] = f"{mismatch} {whose}"
        else:
            pools[name] = pool
    limit = REAL if part == "test" and REAL in pools else ""
    most = pools[limit].largest if limit else len(result.reference)
    for name, pool in pools.items():
        rng = np.random.default_rng([seed, 1])  # each draws from its own rows, whatever its name
        chosen, misplaced = pool.draw(min(pool.largest, most), rng)
        if name == REAL and _of_one_patient(study, chosen):
            result.skipped[name] = "the patches are of one patient"
        else:
            result.rows[name], result.mismatch[name] = chosen, misplaced
    return result


def _reference(study: Study, part: Part) -> np.ndarray:
    return study.train if part == "train" else study.reference


def _of_one_patient(study: Study, rows: np.ndarray) -> bool:
    return len(set(study.patients[rows])) < 2


def _candidates(
    study: Study, combination: Combination, synthetic: SyntheticSet, other_fields: Sequence[str], result: Comparison
) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """A synthetic set's index, its rows of the combination, and the other fields that these can be matched by: those
    that their model was conditioned on, but for those that no sample can follow.
    """
    known = {k: v for k, v in combination.items() if k in synthetic.fields}
    index, rows = synthetic.index, np.flatnonzero(synthetic.labels.having(known))
    fields = [
        f for f in other_fields if f in synthetic.fields and set(index[f].iloc[rows].astype(str)) - NOT_CONDITIONED
    ]
    beyond = [f for f in fields if _beyond(study, f, result.reference, study.train)]
    if beyond:
        pair = [f for f in (study.class_field, *beyond) if f in synthetic.fields]
        of_class = {name: value for name, value in known.items() if name == study.class_field}
        seen = study.rows_of(study.train, known)  # none of a combination that is held out: then of its class
        trained = strata(study.index, seen if len(seen) else study.rows_of(study.train, of_class), pair)
        rows = rows[np.isin(strata(index, rows, pair).astype(str), np.unique(trained.astype(str)))]
        result.unmatched[synthetic.name] = beyond
    return index, rows, [f for f in fields if f not in beyond]


def _further_real(
    study: Study, combination: Combination, other_fields: Sequence[str], result: Comparison, part: Part
) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """Further real patches, and the fields that these are matched by: patients of the probe, or, where the training
    images are the reference, test patients as far as they can follow these.
    """
    if part == "test":
        return study.index, study.rows_of(study.probe, combination), list(other_fields)
    rows = study.rows_of(study.test, combination)
    beyond = [f for f in other_fields if _beyond(study, f, result.reference, rows)]
    if beyond:
        result.unmatched[REAL] = beyond
    return study.index, rows, [f for f in other_fields if f not in beyond]


def _beyond(study: Study, name: str, reference: np.ndarray, rows: np.ndarray) -> bool:
    """Whether real ``rows`` lack the values of a field that more than a fifth of the reference has."""
    codes, values = study.labels.codes(name)
    counts = np.bincount(codes[reference], minlength=len(values)).astype(float)
    counts[[values[value] for value in NOT_CONDITIONED if value in values]] = 0.0
    there = np.bincount(codes[rows], minlength=len(values)) > 0
    return bool(counts[~there].sum() > (MAX_MISMATCH + 1e-9) * counts.sum())


def _mismatch(source: pd.DataFrame, reference: pd.DataFrame, fields: Sequence[str]) -> str:
    """The first field in which a source's mix is too far from the reference's; empty if there is none. Patches without
    a value of the field do not count.
    """
    for name in fields:
        wanted, found = (_shares(table[name]) for table in (reference, source))
        short = wanted.sub(found, fill_value=0.0)
        if wanted.empty or short.abs().sum() / 2 <= MAX_MISMATCH + 1e-9:
            continue
        value = str(short.idxmax())
        return f"{name} is {value} in {wanted[value]:.0%} of the reference, in {found.get(value, 0.0):.0%}"
    return ""


def _shares(column: pd.Series) -> pd.Series:
    values = column.astype(str)
    return values[~values.isin(NOT_CONDITIONED)].value_counts(normalize=True)
