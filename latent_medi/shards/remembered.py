"""A dataset folder as it was before it is written again: its splits are remembered, its index may not open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_sealed, write_sealed
from latent_medi.core.progress import get_logger
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.folder import INFO_FILE
from latent_medi.shards.layout import SPLIT_PREFIX
from latent_medi.shards.records import PROGRESS_FOLDER

logger = get_logger(__name__)

SPLITS_FILE = "splits.json"


def remember_splits(dataset: PatchDataset) -> None:
    """Note the splits of a dataset that is to be written again: :func:`finish_dataset` records them again."""
    splits = {
        name: {"parts": dataset.index.groupby("patient")[SPLIT_PREFIX + name].first().to_dict(), **entry}
        for name, entry in dataset.info["splits"].items()
    }
    write_sealed(dataset.folder / PROGRESS_FOLDER / SPLITS_FILE, splits)


def remembered_splits(folder: Path) -> dict[str, Any]:
    """The splits of the dataset that this folder was before it was reopened."""
    path = folder / PROGRESS_FOLDER / SPLITS_FILE
    return read_sealed(path, f"Remove {path}: the splits in it are lost, make them again.")[0] if path.is_file() else {}


def opened_or_none(folder: Path) -> PatchDataset | None:
    """The dataset in a folder that is to be written; ``None`` if there is none yet, or with a warning a damaged one."""
    if not (folder / INFO_FILE).is_file():
        return None
    try:
        return PatchDataset.open(folder)
    except UserError as error:
        logger.warning("%s Its splits and selections cannot be kept: it is written again without them.", error.message)
        return None
