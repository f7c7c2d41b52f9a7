"""NCT-CRC-HE: nine tissue classes of colorectal cancer, 224 × 224 px at 0.5 µm per pixel.

    latent-medi shards nct-crc SOURCE OUT --patch-size 224

SOURCE holds ``NCT-CRC-HE-100K`` (or ``…-NONORM``) and optionally ``CRC-VAL-HE-7K``, each with a folder per class (ADI,
BACK, DEB, LYM, MUC, MUS, NORM, STR, TUM) of ``.tif`` files. The source names no patients; it only says that the two
sets share none. So each image counts as one, and every result says so: of the splits only the published one, by set, is
by patient. CC BY 4.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.recipes._common import Options, import_options, recipe_parser, run_recipe
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import ImportSettings

SOURCE_MPP = 0.5
CLASSES = {
    "ADI": "adipose",
    "BACK": "background",
    "DEB": "debris",
    "LYM": "lymphocytes",
    "MUC": "mucus",
    "MUS": "smooth muscle",
    "NORM": "normal mucosa",
    "STR": "stroma",
    "TUM": "tumour",
}
SETS = {"NCT-CRC-HE-100K": "train", "NCT-CRC-HE-100K-NONORM": "train", "CRC-VAL-HE-7K": "test"}
"""Part of the published split by folder."""


def build(source: Path, out: Path, patch_size: int = 224, **options: Unpack[Options]) -> PatchDataset:
    """Write the dataset folder with the split ``published``.

    Args:
        source: Folder that holds the sets' folders.
        out: Dataset folder to write.
        patch_size: Edge of a stored patch in pixels, at most 224.
        options: See :class:`~latent_medi.recipes._common.Options`.

    Raises:
        UserError: The source has another layout.
    """
    there = [name for name in SETS if (Path(source) / name).is_dir()]
    if not there:
        raise UserError(f"{source} holds none of the folders {', '.join(SETS)}.", "Give the folder that holds them.")
    if {"NCT-CRC-HE-100K", "NCT-CRC-HE-100K-NONORM"} <= set(there):
        raise UserError(f"{source} holds the normalised and the raw set of the same patches.", "Keep one of them.")
    rows = []
    for name in there:
        for folder in sorted(p for p in (Path(source) / name).glob("[!.]*") if p.is_dir()):
            if folder.name not in CLASSES:
                raise UserError(f"{folder} is no class; {nearest(folder.name, CLASSES)}.")
            for path in sorted(folder.glob("[!.]*.tif")):  # not the ._ files of macOS
                key = f"{name}/{path.stem.replace('.', '-')}"
                row = {"image": path.relative_to(source).as_posix(), "key": key}
                rows.append(row | {"class": CLASSES[folder.name], "set": name})
    if not rows:
        raise UserError(f"{source} holds no .tif in {there}.")
    settings = ImportSettings(
        root=str(source),
        name="nct-crc",
        key_column="key",
        patient_is="image",
        extra=["set"],
        source_mpp=SOURCE_MPP,
        patches_per_shard=4096,
        **import_options(out, patch_size, options),
    )
    provenance = {
        "source": "NCT-CRC-HE-100K and CRC-VAL-HE-7K (Kather et al. 2018), Zenodo 1214456",
        "licence": "CC BY 4.0",
        "patients": "not known; each image counts as one; the two sets share no patient",
        "recipe": "shards/nct_crc.py",
    }
    split = ({row["key"]: SETS[row["set"]] for row in rows}, {"kind": "as published, by set"})
    return import_images(settings, pd.DataFrame(rows), provenance=provenance, splits={"published": split})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the recipe; returns the folder and its counts."""
    parser = recipe_parser("nct-crc", __doc__, "folder that holds NCT-CRC-HE-100K and CRC-VAL-HE-7K", 224)
    return run_recipe(build, parser, argv, "published", ("class", "set"))
