"""The split of a joined dataset that unlabelled pre-training takes: without the patients of labelled datasets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.progress import get_logger
from latent_medi.shards.checking.duplicates import patients_together
from latent_medi.shards.checking.shared_patients import shared_patients
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.settings import JoinSettings
from latent_medi.shards.writing.rewrite import split_by_patient

logger = get_logger(__name__)

CORPUS = "corpus"
"""Name of the split; its only part is "train"."""


def corpus_split(
    datasets: Sequence[PatchDataset], prefixes: Sequence[str], index: pd.DataFrame, settings: JoinSettings
) -> dict[str, Any]:
    """The split of all patients but those who are also in other datasets, and those of the same folder who share a
    picture with these, as a dataset that is written remembers it.

    Args:
        datasets: The joined datasets.
        prefixes: What the names of each one's patients begin with in the joined one.
        index: Index of the joined dataset.
        settings: The other datasets.

    Raises:
        UserError: A folder has a split of that name, or nobody is left.
    """
    without = [PatchDataset.open(path) for path in settings.without]
    labelled = [dataset.index.iloc[_labelled(dataset, settings.unlabelled)] for dataset in without]
    if taken := [dataset.folder for dataset in datasets if CORPUS in dataset.splits]:
        raise UserError(f"{taken[0]} has a split {CORPUS!r}, which `without` makes.", "Join the folders that it is of.")
    left_out: set[str] = set()
    counts = {"by_name": 0, "by_picture": 0}
    for dataset, prefix in zip(datasets, prefixes, strict=True):
        shared = shared_patients(dataset, without, labelled)
        found = shared.all.union(
            *(group for group in patients_together(dataset.index) if not shared.all.isdisjoint(group))
        )
        left_out |= {prefix + patient for patient in found}
        counts["by_name"] += len(shared.by_name)
        counts["by_picture"] += len(found - shared.by_name)
    column = pd.Series(np.where(index["patient"].isin(left_out), "", "train"), index.index)
    if not (column == "train").any():
        names = ", ".join(str(dataset.folder) for dataset in without)
        raise UserError(f"Every patient is also in {names}, so nothing is left to train on.", "Join other folders.")
    logger.info(
        "Split %r: %d of %d patients; left out are %d with a name and %d with a picture of %s",
        CORPUS,
        index["patient"].nunique() - len(left_out),
        index["patient"].nunique(),
        counts["by_name"],
        counts["by_picture"],
        ", ".join(dataset.name for dataset in without),
    )
    of = [{"name": dataset.name, "index_sha256": dataset.info.get("index_sha256", "")} for dataset in without]
    recipe = {"kind": "without", "of": of, "left_out": counts}
    return split_by_patient(
        index, column, recipe | ({"unlabelled": settings.unlabelled} if settings.unlabelled else {})
    )


def _labelled(dataset: PatchDataset, unlabelled: Mapping[str, str]) -> np.ndarray:
    """Row numbers of a dataset that are not in its unlabelled part.

    Raises:
        UserError: It has no such split or part.
    """
    keep = np.ones(len(dataset), bool)
    for split, part in unlabelled.items():
        if split not in dataset.splits:
            raise UserError(f"{dataset.folder} has no split {split!r}; {nearest(split, dataset.splits)}.")
        here = (dataset.index[SPLIT_PREFIX + split] == part).to_numpy()
        if not here.any():
            parts = ", ".join(sorted(set(dataset.index[SPLIT_PREFIX + split]) - {""}))
            raise UserError(f"Split {split!r} of {dataset.folder} has no part {part!r}; it has {parts}.")
        keep &= ~here
    return np.flatnonzero(keep)
