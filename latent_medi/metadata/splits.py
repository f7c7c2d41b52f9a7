"""Splits of a dataset. The patient is the unit: no function here can divide one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest


def assert_patient_disjoint(index: pd.DataFrame, column: str) -> None:
    """Refuse a split in which a patient is on two sides. Rows with ``""`` are in no split.

    Args:
        index: A row per patch with ``patient`` and the split's column.
        column: The split's column.

    Raises:
        UserError: Names the patients and their splits.
    """
    for name in ("patient", column):
        if name not in index.columns:
            raise UserError(f"The index has no column {name!r}; {nearest(name, [str(c) for c in index.columns])}.")
    used = index.loc[index[column] != "", ["patient", column]].drop_duplicates()
    shared = used[used["patient"].duplicated(keep=False)]
    if len(shared):
        patients = sorted(shared["patient"].unique())
        named = "; ".join(f"{p!r} in {sorted(shared.loc[shared['patient'] == p, column])}" for p in patients[:5])
        raise UserError(
            f"{column}: {len(patients)} patients are in more than one part: {named}.",
            "Split by patient: patches of one patient resemble each other, and a score across them is inflated.",
        )


def split_column(index: pd.DataFrame, split: str) -> str:
    """The column of a split that is given by its name or by that of its column.

    Raises:
        UserError: There is none; names the splits that there are.
    """
    for column in (split, f"split_{split}"):
        if column in index.columns:
            return column
    known = [str(c).removeprefix("split_") for c in index.columns if str(c).startswith("split_")]
    raise UserError(
        f"There is no split {split!r}; " + (f"there is {', '.join(known)}." if known else "there is none at all."),
        f"`latent-medi split DATA name={split} …` makes it.",
    )


def random_split(
    index: pd.DataFrame, fractions: Mapping[str, float], seed: int, stratify: Sequence[str] = ()
) -> pd.Series:
    """Assign whole patients to splits at random.

    Within each stratum (the most frequent combination of ``stratify`` among a patient's patches) patients are shuffled
    and dealt out: whole parts first, the rest to the splits furthest behind. A patient's place in the shuffle is a
    hash of its name and the seed, so it does not depend on the order of rows or on the other patients.

    Args:
        index: A row per patch with ``patient``.
        fractions: Share of patients by split name, > 0, adding up to 1.
        seed: Seed.
        stratify: Columns to stratify by, such as class and site.

    Returns:
        The split's name for each row, with the index's row labels.

    Raises:
        UserError: The fractions do not add up to 1.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"The fractions of a split are > 0 and add up to 1, not {dict(fractions)}.")
    for name in ("patient", *stratify):
        if name not in index.columns:
            raise UserError(f"The index has no column {name!r}; {nearest(name, [str(c) for c in index.columns])}.")
    by_stratum: dict[tuple[str, ...], list[str]] = {}
    for patient, *stratum in _usual_stratum(index, list(stratify)).itertuples(index=False, name=None):
        by_stratum.setdefault(tuple(stratum), []).append(str(patient))
    of_patient: dict[str, str] = {}
    dealt = dict.fromkeys(fractions, 0)
    for _, patients in sorted(by_stratum.items()):
        patients.sort(key=lambda p: hashlib.sha256(f"{seed}/{p}".encode()).hexdigest())
        names = _deal(len(patients), fractions, dealt)
        of_patient |= dict(zip(patients, names, strict=True))
    return index["patient"].map(of_patient).rename("split")


def _usual_stratum(index: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """A row per patient with its most frequent combination of some columns; the first in order where two are equal."""
    if not columns:
        return index[["patient"]].drop_duplicates().sort_values("patient")
    cells = index[["patient", *columns]].astype(str)
    counts = (
        cells.groupby(["patient", *columns], sort=True, observed=True).size().rename("").reset_index()
    )  # no field's name
    return (
        counts.sort_values(["patient", ""], ascending=[True, False], kind="stable")
        .drop_duplicates("patient")
        .drop(columns="")
    )


def _deal(count: int, fractions: Mapping[str, float], dealt: dict[str, int]) -> list[str]:
    """Split names for ``count`` patients: whole parts first, then the rest to the splits furthest behind over all
    strata so far.
    """
    sizes = {name: int(np.floor(count * share + 1e-9)) for name, share in fractions.items()}
    total = sum(dealt.values()) + count
    while sum(sizes.values()) < count:
        behind = max(fractions, key=lambda n: (fractions[n] * total - dealt[n] - sizes[n], fractions[n]))
        sizes[behind] += 1
    for name, size in sizes.items():
        dealt[name] += size
    return [name for name, size in sizes.items() for _ in range(size)]


def hold_out(index: pd.DataFrame, combinations: Sequence[Mapping[str, str]]) -> pd.Series:
    """Which rows belong to a held-out combination, i.e. match all columns of any of them.

    Args:
        index: A row per patch.
        combinations: Value by column; ``[{"class": "gleason4", "site": "radboud"}]``.

    Returns:
        bool, with the index's row labels.

    Raises:
        UserError: A column is absent, a combination is empty, or no row has a named value (a likely misspelling).
    """
    matches = pd.Series(False, index=index.index)
    for combination in combinations:
        if not combination:
            raise UserError("A held-out combination names at least one column; an empty one would hold out everything.")
        match = pd.Series(True, index=index.index)
        for column, value in combination.items():
            if column not in index.columns:
                raise UserError(
                    f"The index has no column {column!r}; {nearest(column, [str(c) for c in index.columns])}."
                )
            here = index[column].astype(str) == str(value)
            if not here.any():
                known = sorted(index[column].astype(str).unique())
                raise UserError(f"No row has {column} = {value!r}; {nearest(str(value), known)}.")
            match &= here
        matches |= match
    return matches
