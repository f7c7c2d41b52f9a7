"""What a selection judges, and by what: two datasets opened and checked, cells and fields found, the recipe of it."""

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
from latent_medi.metadata.schema import UNKNOWN_WORD
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.selection.settings import SelectSettings
from latent_medi.shards.checking.duplicates import joined_patients
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.format.selections import check_selection_name

MIN_PATIENTS = 10
"""Fewer patients than this say nothing about distances between patients."""
MIN_PATIENTS_OF_VALUE = 2
"""A probe is checked on patients that it did not learn from, so each value needs two."""
_NO_EFFECT = ("data", "real", "batch", "device", "workers", "cache", "replace", "encoder", "weights")


@dataclass
class Task:
    """What is judged, and by what.

    Args:
        synthetic: The synthetic dataset.
        real: Index of the real training patches.
        real_rows: Their row numbers in their dataset.
        cells: Fields that make a cell.
        fields: Fields that are judged.
        groups: Groups of fields with a centroid per combination.
        names: Values of each cell, in the order of the cells' codes.
        cell: Cell code of each synthetic row, int64.
        unseen: Whether a cell has no real training patch, by code.
    """

    synthetic: PatchDataset
    real: pd.DataFrame
    real_rows: np.ndarray
    cells: list[str]
    fields: list[str]
    groups: list[list[str]]
    names: list[tuple[str, ...]]
    cell: np.ndarray
    unseen: np.ndarray


def check_settings(settings: SelectSettings) -> None:
    """Refuse numbers out of range and a part of the split that is not for learning.

    Raises:
        UserError: Names the setting.
    """
    if missing := [name for name in ("data", "real") if not getattr(settings, name)]:
        raise UserError(f"Selection needs {' and '.join(missing)}.", "latent-medi select SYNTHETIC real=REAL")
    check_selection_name(settings.name)
    for name in ("confidence", "outliers", "copies", "duplicates", "share"):
        if not 0.0 <= getattr(settings, name) <= 1.0:
            raise UserError(f"{name} is {getattr(settings, name)}; it is a number from 0 to 1.")
    for name, least in (("per_cell", 0), ("most", 100), ("batch", 1), ("workers", 0), ("regularisation", 0)):
        if getattr(settings, name) < least:
            raise UserError(f"{name} is {getattr(settings, name)}; it is {least} or more.")
    if not settings.share:
        raise UserError("share is 0: nothing would be chosen.")
    if not settings.split_value.startswith("train"):
        raise UserError(
            f"A selection learns from a training part of a split, not from {settings.split_value!r}.",
            "What test patients taught would flatter every score on them. Set split_value=train.",
        )


def open_task(settings: SelectSettings) -> tuple[Task, PatchDataset]:
    """Open both datasets and find out what there is to judge.

    Returns:
        The task and the real dataset.

    Raises:
        UserError: A folder of the wrong kind, a split or field that is not there, a value that a criterion cannot
            judge, or too few patients.
    """
    synthetic, real = PatchDataset.open(settings.data), PatchDataset.open(settings.real)
    for dataset, setting, origin in ((synthetic, "data", "synthetic"), (real, "real", "real")):
        if wrong := int((dataset.index["origin"] != origin).sum()):
            raise UserError(
                f"{dataset.folder} is given as {setting}, but {wrong} of its {len(dataset)} patches are not {origin}.",
                "data=SYNTHETIC real=REAL; are the two swapped?",
            )
    ours, theirs = ((d.patch_size, d.info["mpp"]) for d in (synthetic, real))
    if ours != theirs:
        raise UserError(
            f"{settings.data} has patches of {ours[0]} px at {ours[1]:g} µm per pixel, {settings.real} of "
            f"{theirs[0]} px at {theirs[1]:g}: their features do not compare.",
            "Give the real dataset that the model learned from.",
        )
    if settings.split not in real.splits:
        raise UserError(
            f"{settings.real} has no split {settings.split!r}; {nearest(settings.split, real.splits)}.",
            "`latent-medi split` makes one.",
        )
    split = SPLIT_PREFIX + settings.split
    assert_patient_disjoint(real.index, split)
    rows = real.rows({split: settings.split_value})
    if not len(rows):
        raise UserError(f"Split {settings.split!r} of {settings.real} has no {settings.split_value!r} patches.")
    table = real.index.iloc[rows].reset_index(drop=True)
    # Who shares a picture is one patient: a distance of 0 between patients would let every copy pass.
    table = table.assign(patient=joined_patients(table))
    patients = table["patient"].nunique()
    if patients < MIN_PATIENTS:
        raise UserError(
            f"{settings.real} has {patients} training patients; distances between patients need {MIN_PATIENTS}.",
            "Choose at random instead, or add patients.",
        )
    cells = _known(settings.cells or _stated(synthetic), synthetic, real, "cells")
    fields = _known(settings.fields or _class_of(synthetic, cells) or cells, synthetic, real, "fields")
    groups = [_known(group, synthetic, real, "centroids") for group in settings.centroids] or [[f] for f in fields]
    labels = list(map(tuple, synthetic.index[cells].astype(str).to_numpy()))
    names = sorted(set(labels))
    codes = {name: code for code, name in enumerate(names)}
    seen = set(map(tuple, table[cells].astype(str).to_numpy()))
    task = Task(
        synthetic, table, rows, cells, fields, groups, names,
        np.array([codes[label] for label in labels]), np.array([name not in seen for name in names]),
    )  # fmt: skip
    _check_values(task, settings)
    return task, real


def _stated(synthetic: PatchDataset) -> list[str]:
    """Class and categorical fields that at least one patch has a value of."""
    index = synthetic.index
    return [f.name for f in synthetic.schema.fields if not f.continuous and index[f.name].isin(f.values).any()]


def _class_of(synthetic: PatchDataset, cells: Sequence[str]) -> list[str]:
    """The class field, if it is among the cells' fields."""
    class_field = synthetic.schema.class_field
    return [class_field.name] if class_field is not None and class_field.name in cells else []


def _known(names: Sequence[str], synthetic: PatchDataset, real: PatchDataset, setting: str) -> list[str]:
    """The fields of a setting, each checked to be one that both datasets have and that has values."""
    if not names:
        raise UserError(f"{synthetic.folder} states no class and no categorical field: there is nothing to judge by.")
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


def _check_values(task: Task, settings: SelectSettings) -> None:
    """Refuse what a criterion would have to judge without ever having seen it."""
    if "confidence" in settings.criteria or settings.rank == "confidence":
        for name in task.fields:
            patients = task.real.groupby(name)["patient"].nunique()
            asked = set(column(task.synthetic.index, name).tolist()) - {UNKNOWN_WORD}
            for value in sorted(asked):
                count = int(patients.get(value, 0))
                if count < MIN_PATIENTS_OF_VALUE:
                    raise UserError(
                        f"The criterion confidence cannot judge {name} {value!r}: {count} training patients of "
                        f"{settings.real} have it, and a probe needs {MIN_PATIENTS_OF_VALUE}.",
                        f"Judge other fields: fields=[…] without {name}; or leave confidence out of criteria and rank.",
                    )
            if len(set(column(task.real, name)) - {UNKNOWN_WORD}) < 2:
                raise UserError(
                    f"The criterion confidence needs two values of {name}; the training patients have one.",
                    f"Judge other fields: fields=[…] without {name}.",
                )
    if "centroid" in settings.criteria or settings.rank == "centroid":
        for group in task.groups:
            there = set(joined(task.real, group))
            asked = {label for label in joined(task.synthetic.index, group) if label is not None}
            if lacking := sorted(asked - there):
                raise UserError(
                    f"The criterion centroid cannot judge {' × '.join(group)} {lacking[0]!r}: no training patch of "
                    f"{settings.real} has it ({len(lacking)} such combinations).",
                    f"Judge the fields one by one: centroids={[[name] for name in group]}."
                    if len(group) > 1
                    else f"Leave {group[0]} out of centroids.",
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


def make_recipe(settings: SelectSettings, task: Task, real: PatchDataset, encoder: ImageEncoder) -> dict[str, Any]:
    """All that the choice depends on."""
    kept = {k: v for k, v in asdict(settings).items() if k not in _NO_EFFECT}
    resolved = {"cells": task.cells, "fields": task.fields, "centroids": task.groups, "criteria": settings.criteria}
    about_real = sorted({"key", "patient", *task.cells, *task.fields, *(f for g in task.groups for f in g)})
    return {
        **kept,
        **resolved,
        "encoder": {"name": encoder.name, "fingerprint": encoder.fingerprint},
        "synthetic": _hash(dataset_hash(task.synthetic), task.synthetic.index[about_real]),
        "real": {
            "name": real.name, "patches": len(task.real), "patients": int(task.real["patient"].nunique()),
            "sha256": _hash(dataset_hash(real), task.real[about_real]),
        },
    }  # fmt: skip


def _hash(content: str, table: pd.DataFrame) -> str:
    text = table.to_csv(index=False, lineterminator="\n")
    return hashlib.sha256(f"{content}\n{text}".encode()).hexdigest()


def joined_all(index: pd.DataFrame, fields: Sequence[str]) -> np.ndarray:
    """The values of some fields as one label per row, unknown ones too. str [N]."""
    return index[list(fields)].astype(str).agg("\x1f".join, axis=1).to_numpy(str)
