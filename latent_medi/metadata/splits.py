"""Splits of a dataset by patient: no function here divides the patches of a patient."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.metadata.tables import require_columns


def assert_patient_disjoint(index: pd.DataFrame, column: str) -> None:
    """Refuse a split in which a patient is in two parts. Rows with ``""`` are in no part.

    Args:
        index: A row per patch with ``patient`` and the split's column.
        column: The split's column.

    Raises:
        UserError: Names the patients and their parts.
    """
    require_columns(index, ["patient", column], "The index")
    used = index.loc[index[column] != "", ["patient", column]].drop_duplicates()
    shared = used[used["patient"].duplicated(keep=False)]
    if len(shared):
        patients = sorted(shared["patient"].unique())
        named = "; ".join(f"{p!r} in {sorted(shared.loc[shared['patient'] == p, column])}" for p in patients[:5])
        raise UserError(
            f"{column}: {len(patients)} patients are in more than one part: {named}.",
            "Split by patient: patches of one patient resemble each other, and scores across parts would be inflated.",
        )


def split_column(index: pd.DataFrame, split: str) -> str:
    """The column of a split that is given by its name or its column.

    Raises:
        UserError: There is no such split; names the existing ones.
    """
    for column in (split, f"split_{split}"):
        if column in index.columns:
            return column
    known = [str(c).removeprefix("split_") for c in index.columns if str(c).startswith("split_")]
    raise UserError(
        f"There is no split {split!r}; " + (f"there is {', '.join(known)}." if known else "the data have no split."),
        f"`latent-medi split DATA name={split} …` makes it.",
    )


def random_key(seed: int, *names: str) -> str:
    """A hash of a seed and names: sorting by it gives a random order that does not depend on the other items."""
    return hashlib.sha256("\x1f".join([str(seed), *names]).encode()).hexdigest()


def random_split(
    index: pd.DataFrame, fractions: Mapping[str, float], seed: int, stratify: Sequence[str] = ()
) -> pd.Series:
    """Assign patients to the parts of a split at random.

    Within each stratum (the most frequent combination of ``stratify`` among a patient's patches) patients are shuffled,
    and each part gets its share rounded down; the remaining patients go to the parts that are furthest below their
    share. A patient's place in the shuffle is a hash of its name and the seed: it does not depend on the order of rows
    or on other patients.

    Args:
        index: A row per patch with ``patient``.
        fractions: Share of patients by part, > 0, adding up to 1.
        seed: Seed.
        stratify: Columns to stratify by, such as class and site.

    Returns:
        The part of each row, with the index's row labels.

    Raises:
        UserError: The fractions do not add up to 1.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise UserError(f"The fractions of a split are > 0 and add up to 1, not {dict(fractions)}.")
    require_columns(index, ["patient", *stratify], "The index")
    by_stratum: dict[tuple[str, ...], list[str]] = {}
    for patient, *stratum in _usual_stratum(index, list(stratify)).itertuples(index=False, name=None):
        by_stratum.setdefault(tuple(stratum), []).append(str(patient))
    of_patient: dict[str, str] = {}
    assigned = dict.fromkeys(fractions, 0)
    for _, patients in sorted(by_stratum.items()):
        patients.sort(key=lambda p: hashlib.sha256(f"{seed}/{p}".encode()).hexdigest())
        names = _parts(len(patients), fractions, assigned)
        of_patient |= dict(zip(patients, names, strict=True))
    return index["patient"].map(of_patient).rename("split")


def _usual_stratum(index: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """A row per patient with its most frequent combination of some columns; of equally frequent ones the first."""
    if not columns:
        return index[["patient"]].drop_duplicates().sort_values("patient")
    cells = index[["patient", *columns]].astype(str)
    counts = cells.groupby(["patient", *columns], sort=True, observed=True).size().rename("").reset_index()
    ordered = counts.sort_values(["patient", ""], ascending=[True, False], kind="stable")
    return ordered.drop_duplicates("patient").drop(columns="")


def _parts(count: int, fractions: Mapping[str, float], assigned: dict[str, int]) -> list[str]:
    """The parts of ``count`` patients: each part's share rounded down, the rest to the parts that are furthest below
    their share of all strata so far. Adds them to ``assigned``.
    """
    sizes = {name: int(np.floor(count * share + 1e-9)) for name, share in fractions.items()}
    total = sum(assigned.values()) + count
    while sum(sizes.values()) < count:
        behind = max(fractions, key=lambda n: (fractions[n] * total - assigned[n] - sizes[n], fractions[n]))
        sizes[behind] += 1
    for name, size in sizes.items():
        assigned[name] += size
    return [name for name, size in sizes.items() for _ in range(size)]


def hold_out(index: pd.DataFrame, combinations: Sequence[Mapping[str, str]]) -> pd.Series:
    """Which rows match all columns of any held-out combination.

    Args:
        index: A row per patch.
        combinations: Value by column; ``[{"class": "gleason4", "site": "radboud"}]``.

    Returns:
        bool, with the index's row labels.

    Raises:
        UserError: A column is absent, a combination is empty, or no row has one of its values.
    """
    matches = pd.Series(False, index=index.index)
    for combination in combinations:
        if not combination:
            raise UserError("A held-out combination has no column: it would hold out everything.", "Name a column.")
        require_columns(index, list(combination), "The index")
        match = pd.Series(True, index=index.index)
        for column, value in combination.items():
            here = index[column].astype(str) == str(value)
            if not here.any():
                known = sorted(index[column].astype(str).unique())
                raise UserError(f"No row has {column} = {value!r}; {nearest(str(value), known)}.")
            match &= here
        matches |= match
    return matches
