"""Splits of a dataset folder by patient; patients who share a picture are kept together."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from latent_medi.core.locks import output_lock
from latent_medi.core.progress import get_logger
from latent_medi.metadata.row_filter import only_mask
from latent_medi.metadata.settings import SplitSettings
from latent_medi.metadata.split_from_table import refuse_row_order, split_from_table
from latent_medi.metadata.split_schemes import Split, make_split, of_kept
from latent_medi.shards.checking.duplicates import find_duplicates, patients_together
from latent_medi.shards.dataset import PatchDataset

logger = get_logger(__name__)


def split_folder(settings: SplitSettings) -> tuple[Split, pd.DataFrame]:
    """Split the patients of a dataset folder, and record the split in it.

    Returns:
        The split, and the index of the folder.

    Raises:
        UserError: As for :func:`~latent_medi.metadata.split_schemes.make_split` and
            :meth:`~latent_medi.shards.dataset.PatchDataset.add_split`.
    """
    with output_lock(settings.data):  # from reading the index to writing it
        dataset = PatchDataset.open(settings.data)
        if dataset.patients_note:
            logger.warning("%s: %s", dataset.folder, dataset.patients_note)
        split = split_of(dataset, settings)
        dataset.add_split(settings.name, split.column, split.recipe, settings.replace)
    return split, dataset.index


def split_of(dataset: PatchDataset, settings: SplitSettings) -> Split:
    """The split of a dataset folder that some settings make; nothing is recorded but shared pictures, if the folder is
    of a version that did not look for them.
    """
    refuse_row_order(settings)  # before pictures are looked for, which may take long
    find_duplicates(dataset)
    return split_of_index(dataset.index, settings)


def split_of_index(index: pd.DataFrame, settings: SplitSettings) -> Split:
    """The split that some settings make of an index, which may be that of a dataset that is only listed yet: then no
    patients are known to share a picture.
    """
    refuse_row_order(settings)
    if not settings.table:
        return make_split(index, settings, patients_together(index, settings.allow_duplicates))
    split = split_from_table(index, replace(settings, only={}))  # the filter is of the folder's fields
    if not settings.only:
        return split
    return of_kept(index, split, only_mask(index, settings.only, settings.data), settings)
