"""Patients of one dataset who are also in others: by name, and by a picture that both have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from PIL import Image

from latent_medi.shards.checking.duplicates import find_duplicates
from latent_medi.shards.checking.likeness import shared_pictures
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.layout import FINGERPRINT

_NAMED = ("patient", "slide")
"""Where the column of patients holds these, a name is that of a person; an image's or a group's name is chance."""


@dataclass(frozen=True)
class SharedPatients:
    """Patients of a dataset who are also in others.

    Args:
        by_name: Those whose name another dataset has, too.
        by_picture: Those with a picture that another dataset has, too, also turned, mirrored or encoded again.
    """

    by_name: frozenset[str]
    by_picture: frozenset[str]

    @property
    def all(self) -> frozenset[str]:
        """Both."""
        return self.by_name | self.by_picture


def shared_patients(
    dataset: PatchDataset, others: Sequence[PatchDataset], counted: Sequence[pd.DataFrame] | None = None
) -> SharedPatients:
    """Find the patients of a dataset who are also in others.

    Names are compared where both datasets' patients are persons or slides, or both are one folder; names of slides,
    where either knows its slides alone. Pictures are compared in any case.

    Args:
        dataset: The dataset; its synthetic patches take no part.
        others: Other datasets, or the same.
        counted: Rows of each other dataset's index that count; by default all.
    """
    rows = [other.index for other in others] if counted is None else list(counted)
    names: set[str] = set()
    for other, table in zip(others, rows, strict=True):
        kinds = {dataset.patient_is, other.patient_is}
        if kinds <= set(_NAMED) or dataset.folder.resolve() == other.folder.resolve():
            column = "slide" if kinds == set(_NAMED) else "patient"
            names |= set(dataset.index.loc[dataset.index[column].isin(table[column]), "patient"])
    everything = [dataset, *others]
    for each in everything:
        find_duplicates(each)
    prints = [each.index.get(FINGERPRINT, pd.Series("", each.index.index)).fillna("") for each in everything]
    for number, table in enumerate(rows, 1):  # those that do not count take no part
        prints[number] = prints[number].where(prints[number].index.isin(table.index), "")
    # All patches of a dataset count as one patient, so that only pictures of several datasets are found.
    owner = np.repeat(np.arange(len(everything)), [len(each) for each in everything])
    start = np.cumsum([0, *(len(each) for each in everything)])

    edge = min(each.patch_size for each in everything)

    def read(rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), edge, edge, 3), np.uint8)
        for number, each in enumerate(everything):
            here = owner[rows] == number
            if here.any():
                images[here] = _resized(each.read(rows[here] - start[number]), edge)
        return images

    every = [text for part in prints for text in part.tolist()]
    picture = shared_pictures(every, owner.astype(str).tolist(), read)
    mine, theirs = picture[: len(dataset)], picture[len(dataset) :]
    found = np.isin(mine, theirs[theirs >= 0]) & (mine >= 0)
    pictures = frozenset(dataset.index["patient"].to_numpy(str)[found].tolist())
    return SharedPatients(frozenset(names), pictures)


def _resized(images: np.ndarray, edge: int) -> np.ndarray:
    if images.shape[1] == edge:
        return images
    return np.stack([np.asarray(Image.fromarray(image).resize((edge, edge))) for image in images])
