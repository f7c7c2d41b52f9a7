"""Splits that test generalisation: whole sites or whole combinations of fields are held out of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.counting import counted
from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.metadata.fields import is_missing
from latent_medi.metadata.published_splits import MEDI_SETTINGS, changed, published_columns, published_split
from latent_medi.metadata.row_filter import only_mask
from latent_medi.metadata.settings import SplitSettings
from latent_medi.metadata.splits import assert_patient_disjoint, hold_out, random_key, random_split
from latent_medi.metadata.tables import require_columns

logger = get_logger("metadata")

_TESTED = 10  # patients of a held-out combination that `evaluate` needs


@dataclass(frozen=True)
class Split:
    """A split and how it was made.

    Args:
        column: The part of each row, with the index's row labels.
        recipe: JSON-able: the settings, and the random choices.
    """

    column: pd.Series
    recipe: dict[str, Any] = field(default_factory=dict)


def make_split(index: pd.DataFrame, settings: SplitSettings, together: Sequence[Sequence[str]] = ()) -> Split:
    """Split patients: held-out sites and combinations go to one part, the other patients are divided at random.

    A patient with any patch of a held-out site or combination is held out with all patches, and so are the patients who
    share a picture with them. With ``only`` the other rows are in no part: the patients who are left are divided, while
    a published scheme stays as it was published, decided by all rows.

    Args:
        index: A row per patch (or slide) with ``patient`` and the columns that the settings name; cells of these are
            strings.
        settings: See :class:`~latent_medi.metadata.settings.SplitSettings`.
        together: Groups of patients who share a picture: each group counts as one patient.

    Raises:
        UserError: A column or a value of ``only`` is absent, no patient is left for training, training would not see a
            value of a held-out combination, a patient would be in two parts, or a group of patients cannot be kept
            together.
    """
    if not settings.only:
        return _split_of_all(index, settings, together)
    kept = only_mask(index, settings.only, settings.data or "the data")
    if settings.scheme == "hold_out":
        split = _split_of_all(index[kept], settings, together)
    else:
        split = _split_of_all(index, settings, together, kept)
    return of_kept(index, split, kept, settings)


def of_kept(index: pd.DataFrame, split: Split, kept: np.ndarray, settings: SplitSettings) -> Split:
    """A split in which the rows that ``only`` does not keep are in no part.

    Args:
        index: All rows.
        split: Parts of at least the kept rows.
        kept: Which rows those are, bool [len(index)].
        settings: The settings with ``only``.
    """
    only = {name: list(values) for name, values in settings.only.items()}
    column = split.column.reindex(index.index, fill_value="").where(kept, "")
    return Split(column, {**split.recipe, "only": only})


def _split_of_all(
    index: pd.DataFrame,
    settings: SplitSettings,
    together: Sequence[Sequence[str]] = (),
    kept: np.ndarray | None = None,
) -> Split:
    """The split of all rows, without the filter; a published scheme needs each class of the kept rows in both parts."""
    if together:
        first = {patient: group[0] for group in together for patient in group}
        index = index.assign(patient=index["patient"].map(lambda patient: first.get(patient, patient)))
        try:
            split = _split_of_all(index, settings, kept=kept)
        except UserError as error:
            raise UserError(error.message, " ".join(filter(None, [error.hint, _kept_together(together)]))) from None
        if gone := sorted(set(settings.fractions) - set(split.column)) if settings.scheme == "hold_out" else []:
            raise UserError(f"No patient is left for {', '.join(gone)}.", _kept_together(together))
        return Split(split.column, {**split.recipe, "together": [list(group) for group in together]})
    if settings.scheme == "hold_out":
        column, recipe = _hold_out_split(index, settings)
    else:
        column, recipe = published_split(index, settings, kept)
    if settings.allow_duplicates:
        recipe["allow_duplicates"] = list(settings.allow_duplicates)
    named = column.rename("split")
    assert_patient_disjoint(pd.DataFrame({"patient": index["patient"], "split": named}), "split")
    return Split(named, recipe)


def _kept_together(together: Sequence[Sequence[str]]) -> str:
    largest = max(together, key=len)
    return (
        f"{sum(map(len, together))} patients share pictures and are kept together in {len(together)} groups of up to "
        f"{len(largest)} (such as {' and '.join(map(repr, largest[:2]))}). Remove those pictures, or allow them in "
        f"several parts with allow_duplicates='[{', '.join(largest[:2])}]'."
    )


def _hold_out_split(index: pd.DataFrame, settings: SplitSettings) -> tuple[pd.Series, dict[str, Any]]:
    if given := changed(settings, *MEDI_SETTINGS):
        raise UserError(f"{', '.join(given)} would have no effect.", "Give scheme=medi too, or leave them out.")
    if not settings.fractions:
        raise UserError("No fractions are given for the patients that are not held out.", "fractions={train: 1.0}")
    part, training = settings.hold_out_part, training_part(settings)
    holds_out = settings.hold_out or settings.hold_out_fields or settings.sites or settings.site_share
    if holds_out and training in (settings.hold_out_fractions or {part: 1.0}):
        raise UserError(f"Held-out patients would go to {training!r}, the training part.", "Name another part.")
    if settings.hold_out_fractions and not holds_out:
        raise UserError(
            "hold_out_fractions is given, but nothing is held out.",
            "Set hold_out, hold_out_fields, sites or site_share.",
        )
    combinations: list[dict[str, str]] = [dict(c) for c in settings.hold_out]
    sites = list(settings.sites)
    if settings.site_share:
        sites += choose_sites(index, settings.site_field, settings.class_field, settings.site_share, settings.seed)
    combinations += [{settings.site_field: site} for site in sites]
    if settings.hold_out_fields:
        left = index[~index["patient"].isin(index.loc[hold_out(index, combinations), "patient"])]
        combinations += choose_combinations(
            left, settings.hold_out_fields, settings.hold_out_share, settings.seed, settings.thin_patients
        )
    patients = set(index.loc[hold_out(index, combinations), "patient"])
    held = index["patient"].isin(patients)
    if held.all():
        raise UserError(f"All {len(patients)} patients are held out; none is left for {list(settings.fractions)}.")
    column = pd.Series(part, index=index.index, dtype=object)
    column[~held] = random_split(index[~held], settings.fractions, settings.seed, settings.stratify)
    if patients and settings.hold_out_fractions:
        column[held] = _divide(index[held], combinations, settings)
    for empty in [c for c in settings.hold_out if not hold_out(index, [c]).any()]:
        logger.warning("No patient is %s: nothing is held out for it.", " × ".join(map(str, empty.values())))
    if missing := sorted({*settings.fractions, *settings.hold_out_fractions} - set(column)):
        logger.warning("No patient is left for %s: there are %d.", ", ".join(missing), index["patient"].nunique())
    for combination in settings.hold_out:
        tested = index.loc[hold_out(index, [combination]) & (column == "test"), "patient"].nunique()
        if 0 < tested < _TESTED:
            logger.warning(
                "%s has %s in test: `evaluate` needs %d.",
                " × ".join(map(str, combination.values())),
                counted(tested, "patient"),
                _TESTED,
            )
    if combinations:
        _check_training(index[column == training], index, settings, combinations, sites)
    recipe = {
        "kind": "patients at random, with what is held out apart" if combinations else "patients at random",
        "seed": settings.seed,
        "fractions": dict(settings.fractions),
        "stratify": list(settings.stratify),
        "held_out": combinations,
        "held_out_part": part if combinations else "",
    }
    if patients and settings.hold_out_fractions:
        recipe["held_out_part"] = dict(settings.hold_out_fractions)
    return column, recipe


def _divide(held: pd.DataFrame, combinations: Sequence[Mapping[str, str]], settings: SplitSettings) -> pd.Series:
    """Divide the patients of each combination over the parts of ``hold_out_fractions``. A patient with patches of
    several combinations counts for the first.
    """
    first = pd.Series(len(combinations), index=held.index)
    for number in reversed(range(len(combinations))):
        wanted = combinations[number]
        first[(held[list(wanted)].astype(str) == pd.Series(wanted)).all(axis=1)] = number
    owners = held.assign(_held=first.groupby(held["patient"]).transform("min"))
    return random_split(owners, settings.hold_out_fractions, settings.seed, ["_held"])


def training_part(settings: SplitSettings) -> str:
    """The training part: ``train``, or the largest if no part is called so."""
    return "train" if "train" in settings.fractions else max(settings.fractions, key=lambda n: settings.fractions[n])


def _check_training(
    training: pd.DataFrame,
    index: pd.DataFrame,
    settings: SplitSettings,
    combinations: list[dict[str, str]],
    sites: list[str],
) -> None:
    """Refuse a split if no training patient has a value of a held-out combination.

    Raises:
        UserError: Names the values.
    """
    wanted = {(name, value) for combination in combinations for name, value in combination.items()}
    wanted -= {(settings.site_field, site) for site in sites}  # sites that are held out
    if sites and settings.class_field in index.columns:
        wanted |= {(settings.class_field, value) for value in index[settings.class_field].astype(str).unique()}
    seen = {name: set(training[name].astype(str)) for name in {name for name, _ in wanted}}
    gone = [f"{n} = {v!r}" for n, v in sorted(wanted) if v not in seen[n] and not is_missing(v)]
    if gone:
        raise UserError(
            f"In this split no training patient has {', '.join(gone[:8])}"
            + (f" and {len(gone) - 8} more." if len(gone) > 8 else "."),
            "Hold out less, give training a larger fraction, or try another seed.",
        )


def choose_sites(index: pd.DataFrame, site_field: str, class_field: str, share: float, seed: int) -> list[str]:
    """Random sites for an external test, which have at least ``share`` of the patients together.

    A site is skipped if a class would lose its last training patient: the test is of new sites, not of new classes.

    Args:
        index: A row per patch with ``patient`` and both columns.
        site_field: Column of sites.
        class_field: Column of classes; ``""`` if there is none.
        share: Share of patients, above 0 and below 1.
        seed: Seed; the order of sites is that of a hash of name and seed.

    Raises:
        UserError: No choice of sites has that share.
    """
    columns = ["patient", site_field, *([class_field] if class_field else [])]
    require_columns(index, columns, "The index")
    if not 0 < share < 1:
        raise UserError(f"site_share is {share}; it is above 0 and below 1.")
    pairs = index[columns].drop_duplicates()
    total = pairs["patient"].nunique()
    left = Counter(pairs.drop_duplicates(["patient", class_field])[class_field]) if class_field else Counter()
    chosen: list[str] = []
    out: set[str] = set()
    at_site = dict(list(pairs.groupby(site_field, sort=True)))
    for site in sorted((s for s in at_site if not is_missing(s)), key=lambda s: random_key(seed, s)):
        if len(out) >= share * total:
            break
        rows = at_site[site][~at_site[site]["patient"].isin(out)]
        loses = Counter(rows.drop_duplicates(["patient", class_field])[class_field]) if class_field else Counter()
        if any(left[name] <= count for name, count in loses.items()):
            continue
        left -= loses
        out |= set(rows["patient"])
        chosen.append(str(site))
    if len(out) < share * total:
        raise UserError(
            f"No choice of sites has {share:.0%} of the patients and leaves each class a training patient "
            f"({len(out)} of {total} patients could be held out).",
            "Lower site_share, or name the sites.",
        )
    return chosen


def choose_combinations(
    index: pd.DataFrame, fields: Sequence[str], share: float, seed: int, thin_patients: int
) -> list[dict[str, str]]:
    """Random combinations of fields to hold out: ``share`` of the combinations that occur.

    A combination is skipped if one of its values would keep fewer than ``thin_patients`` patients, from whom a model
    can learn that value.

    Args:
        index: A row per patch with ``patient`` and the fields; rows with an unknown value are ignored.
        fields: Two or more columns, such as class and site, or site and race.
        share: Share of the combinations that occur, above 0 and below 1.
        seed: Seed; the order of combinations is that of a hash of values and seed.
        thin_patients: Patients of each value that are not held out, at least.

    Raises:
        UserError: So many combinations cannot be held out.
    """
    fields = list(fields)
    require_columns(index, ["patient", *fields], "The index")
    if len(fields) < 2 or not 0 < share < 1:
        raise UserError(
            f"hold_out_fields is {fields} and hold_out_share is {share}.",
            "Give at least two fields, and a share above 0 and below 1.",
        )
    known = index[["patient", *fields]].drop_duplicates()
    for name in fields:
        known = known[~known[name].map(is_missing)]
    groups = {tuple(map(str, values)): set(rows["patient"]) for values, rows in known.groupby(fields, sort=True)}
    of_value = {
        (name, value): set(rows["patient"]) for name in fields for value, rows in known.groupby(name, sort=True)
    }
    wanted = max(1, round(share * len(groups)))
    chosen: list[dict[str, str]] = []
    out: set[str] = set()
    for values in sorted(groups, key=lambda v: random_key(seed, *v)):
        if len(chosen) >= wanted:
            break
        new = out | groups[values]
        if any(len(of_value[name, value] - new) < thin_patients for name, value in zip(fields, values, strict=True)):
            continue
        chosen.append(dict(zip(fields, values, strict=True)))
        out = new
    if len(chosen) < wanted:
        raise UserError(
            f"Only {len(chosen)} of the {len(groups)} combinations of {fields} can be held out while each value keeps "
            f"{thin_patients} patients; hold_out_share={share:g} means {wanted}.",
            "Lower hold_out_share or thin_patients.",
        )
    return chosen


def needed_columns(settings: SplitSettings) -> list[str]:
    """Columns besides ``patient`` that a split with these settings needs."""
    filtered = [name for name in settings.only if name not in ("patient", "slide")]
    if settings.scheme != "hold_out":
        return list(dict.fromkeys([*published_columns(settings), *filtered]))
    names = [*settings.stratify, *settings.hold_out_fields, *(name for c in settings.hold_out for name in c), *filtered]
    if settings.sites or settings.site_share:
        names.append(settings.site_field)
    if settings.site_share and settings.class_field:
        names.append(settings.class_field)
    return list(dict.fromkeys(names))


def split_summary(index: pd.DataFrame, split: Split) -> Mapping[str, Mapping[str, int]]:
    """Patches, patients and slides (if there is such a column) by part."""
    groups = index.assign(_part=split.column).groupby("_part", sort=True)
    summary: dict[str, dict[str, int]] = {}
    for part, rows in groups:
        summary[str(part)] = {"rows": len(rows), "patients": int(rows["patient"].nunique())}
        if "slide" in rows:
            summary[str(part)]["slides"] = int(rows["slide"].nunique())
    return summary
