"""What a selection starts from: two datasets opened and checked, their fields and combinations, and its recipe."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.features.cache import dataset_hash
from latent_medi.features.encoders import ImageEncoder
from latent_medi.metadata.row_filter import only_mask, only_text
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.selection.settings import SelectSettings
from latent_medi.shards.checking.duplicates import joined_patients
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.format.selections import check_selection_name

BY_DISTANCE = ("outliers", "copies", "duplicates")
"""Filters whose thresholds are quantiles of distances between patients."""
MIN_PATIENTS = 10
"""Patients that these need at least."""
MIN_PATIENTS_OF_VALUE = 2
"""A linear probe is validated on patients that it did not learn from, so each value needs two."""
_NO_EFFECT = ("data", "real", "batch", "device", "workers", "cache", "replace", "encoder", "weights", "farthest")


@dataclass
class Inputs:
    """Synthetic patches to choose from, and real training patches to compare them with.

    Args:
        synthetic: The synthetic dataset.
        real_dataset: The real dataset.
        real_rows: Row numbers of its training patches.
        real: Index of these, [M].
        cells: Fields whose combinations are chosen from.
        fields: Fields that are scored.
        groups: Groups of fields with a centroid per combination.
        names: Values of each combination, in the order of the codes.
        cell: Code of each synthetic row's combination, int64 [N].
        unseen: Whether a combination has no real training patch, by code.
    """

    synthetic: PatchDataset
    real_dataset: PatchDataset
    real_rows: np.ndarray
    real: pd.DataFrame
    cells: list[str]
    fields: list[str]
    groups: list[list[str]]
    names: list[tuple[str, ...]]
    cell: np.ndarray
    unseen: np.ndarray


def check_settings(settings: SelectSettings) -> None:
    """Check that both datasets are given, the name of the selection, and that it learns from a training part.

    Raises:
        UserError: Names the setting.
    """
    if missing := [name for name in ("data", "real") if not getattr(settings, name)]:
        raise UserError(f"Selection needs {' and '.join(missing)}.", "latent-medi select SYNTHETIC real=REAL")
    check_selection_name(settings.name)
    if not settings.split_value.startswith("train"):
        raise UserError(
            f"A selection learns from a training part of a split, not from {settings.split_value!r}.",
            "Set split_value=train, or every score on the test patients is biased.",
        )


def open_inputs(settings: SelectSettings) -> Inputs:
    """Open both datasets, and find the fields to score and the combinations to choose from.

    Raises:
        UserError: A folder of the wrong kind, a missing split or field, a value that a filter cannot score, or too few
            patients.
    """
    synthetic, real = PatchDataset.open(settings.data), PatchDataset.open(settings.real)
    for dataset, setting, origin in ((synthetic, "data", "synthetic"), (real, "real", "real")):
        if wrong := int((dataset.index["origin"] != origin).sum()):
            raise UserError(
                f"{dataset.folder} is given as {setting}, but {wrong} of its {len(dataset)} patches are not {origin}.",
                "Give data=SYNTHETIC real=REAL; the two may be swapped.",
            )
    ours, theirs = ((d.patch_size, d.info["mpp"]) for d in (synthetic, real))
    if ours != theirs:
        raise UserError(
            f"{settings.data} has patches of {ours[0]} px at {ours[1]:g} µm per pixel, {settings.real} of "
            f"{theirs[0]} px at {theirs[1]:g}: their features cannot be compared.",
            "Give the real dataset that the model was trained on.",
        )
    if settings.split not in real.splits:
        raise UserError(
            f"{settings.real} has no split {settings.split!r}; {nearest(settings.split, real.splits)}.",
            "`latent-medi split` makes one.",
        )
    split = SPLIT_PREFIX + settings.split
    assert_patient_disjoint(real.index, split)
    rows = real.rows({split: settings.split_value})
    rows = rows[only_mask(real.index, settings.only, settings.real)[rows]]
    with_only = f" with {only_text(settings.only)}" if settings.only else ""
    if not len(rows):
        raise UserError(
            f"Split {settings.split!r} of {settings.real} has no {settings.split_value!r} patches{with_only}."
        )
    table = real.index.iloc[rows].reset_index(drop=True)
    # Patients with the same picture count as one: their distance of 0 would let every copy pass.
    table = table.assign(patient=joined_patients(table))
    patients, by_distance = table["patient"].nunique(), [name for name in settings.filters if name in BY_DISTANCE]
    if by_distance and patients < MIN_PATIENTS:
        raise UserError(
            f"{settings.real} has {patients} training patients; distances between patients need {MIN_PATIENTS}.",
            f"Leave {', '.join(by_distance)} out of filters (centroid and confidence need fewer), or add patients.",
        )
    cells = _known(settings.cells or _stated(synthetic), synthetic, real, "cells")
    fields = _known(settings.fields or _class_of(synthetic, cells) or cells, synthetic, real, "fields")
    groups = [_known(group, synthetic, real, "centroids") for group in settings.centroids] or [[f] for f in fields]
    labels = list(map(tuple, synthetic.index[cells].astype(str).to_numpy()))
    names = sorted(set(labels))
    codes = {name: code for code, name in enumerate(names)}
    seen = set(map(tuple, table[cells].astype(str).to_numpy()))
    cell, unseen = np.array([codes[label] for label in labels]), np.array([name not in seen for name in names])
    inputs = Inputs(synthetic, real, rows, table, cells, fields, groups, names, cell, unseen)
    _check_values(inputs, settings)
    return inputs


def _stated(synthetic: PatchDataset) -> list[str]:
    """Class and categorical fields with a known value in at least one patch."""
    index = synthetic.index
    return [f.name for f in synthetic.schema.fields if not f.continuous and index[f.name].isin(f.values).any()]


def _class_of(synthetic: PatchDataset, cells: Sequence[str]) -> list[str]:
    """The class field, if the combinations have it."""
    class_field = synthetic.schema.class_field
    return [class_field.name] if class_field is not None and class_field.name in cells else []


def _known(names: Sequence[str], synthetic: PatchDataset, real: PatchDataset, setting: str) -> list[str]:
    """The fields of a setting, checked to be class or categorical fields of both datasets."""
    if not names:
        raise UserError(f"{synthetic.folder} has no class and no categorical field with a value.")
    for name in names:
        for dataset in (synthetic, real):
            able = [f.name for f in dataset.schema.fields if not f.continuous]
            if name not in able:
                raise UserError(
                    f"{setting} names {name!r}, no class or categorical field of {dataset.folder}; "
                    f"{nearest(name, able)}."
                )
    if len(set(names)) < len(names):
        raise UserError(f"{setting} names a field twice: {list(names)}.")
    return list(names)


def _check_values(inputs: Inputs, settings: SelectSettings) -> None:
    """Check that training patches have every value that a filter is to recognise."""
    needed = {*settings.filters, settings.rank}
    for name in inputs.fields if "confidence" in needed else []:
        patients = inputs.real.groupby(name)["patient"].nunique()
        stated = set(column(inputs.synthetic.index, name).tolist()) - {UNKNOWN_WORD}
        for value in sorted(stated):
            count = int(patients.get(value, 0))
            if count < MIN_PATIENTS_OF_VALUE:
                raise UserError(
                    f"The filter confidence cannot score {name} {value!r}: {count} training patients of "
                    f"{settings.real} have it, and a linear probe needs {MIN_PATIENTS_OF_VALUE}.",
                    f"Set fields to others than {name}, or leave confidence out of filters and rank.",
                )
        if len(set(column(inputs.real, name)) - {UNKNOWN_WORD}) < 2:
            raise UserError(
                f"The filter confidence needs two values of {name}; the training patients have one.",
                f"Set fields to others than {name}.",
            )
    for group in inputs.groups if "centroid" in needed else []:
        known = set(joined(inputs.real, group))
        stated = {label for label in joined(inputs.synthetic.index, group) if label is not None}
        if lacking := sorted(stated - known):
            one_by_one = f"Score the fields one by one: centroids={[[name] for name in group]}."
            raise UserError(
                f"The filter centroid cannot score {' × '.join(group)} {lacking[0]!r}: no training patch of "
                f"{settings.real} has it ({len(lacking)} such combinations).",
                one_by_one if len(group) > 1 else f"Leave {group[0]} out of centroids.",
            )


def column(index: pd.DataFrame, name: str) -> np.ndarray:
    """A column as strings, [N]."""
    return index[name].to_numpy(str)


def joined(index: pd.DataFrame, group: Sequence[str]) -> np.ndarray:
    """The values of a group of fields as one label per row, None where a value is unknown. object [N]."""
    table = index[list(group)].astype(str)
    labels = table.agg(" × ".join, axis=1).to_numpy(object)
    labels[(table == UNKNOWN_WORD).any(axis=1).to_numpy()] = None
    return labels


def make_recipe(settings: SelectSettings, inputs: Inputs, encoder: ImageEncoder) -> dict[str, Any]:
    """All that the choice depends on; entries are named as in the first version of the format."""
    kept = {k: v for k, v in asdict(settings).items() if k not in (*_NO_EFFECT, "filters")}
    if not settings.only:  # as in records of versions without it
        del kept["only"]
    if not settings.percent:
        del kept["percent"]
    compared = sorted({"key", "patient", *inputs.cells, *inputs.fields, *(f for g in inputs.groups for f in g)})
    return {
        **kept,
        "cells": inputs.cells,
        "fields": inputs.fields,
        "centroids": inputs.groups,
        "criteria": settings.filters,
        "encoder": {"name": encoder.name, "fingerprint": encoder.fingerprint},
        "synthetic": _hash(dataset_hash(inputs.synthetic), inputs.synthetic.index[compared]),
        "real": {
            "name": inputs.real_dataset.name,
            "patches": len(inputs.real),
            "patients": int(inputs.real["patient"].nunique()),
            "sha256": _hash(dataset_hash(inputs.real_dataset), inputs.real[compared]),
        },
    }


def _hash(content: str, table: pd.DataFrame) -> str:
    text = table.to_csv(index=False, lineterminator="\n")
    return hashlib.sha256(f"{content}\n{text}".encode()).hexdigest()


def joined_all(index: pd.DataFrame, fields: Sequence[str]) -> np.ndarray:
    """The values of some fields as one label per row, unknown ones too. str [N]."""
    return index[list(fields)].astype(str).agg("\x1f".join, axis=1).to_numpy(str)
