"""NCT-CRC-HE: nine tissue classes of colorectal cancer, 224 × 224 px at 0.5 µm per pixel.

    latent-medi shards nct-crc SOURCE OUT --patch-size 224

SOURCE holds ``NCT-CRC-HE-100K`` (or ``…-NONORM``) and, if there, ``CRC-VAL-HE-7K``, each with a folder per class (ADI,
BACK, DEB, LYM, MUC, MUS, NORM, STR, TUM) of ``.tif`` files. The source names no patients; it only says that the two
sets share none. So each set is *one* patient here: no split finer than the published one is honest. CC BY 4.0.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.core.errors import UserError, nearest
from latent_medi.core.paths import path_argument
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import CODECS
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import Codec, ImportSettings

SOURCE_MPP = 0.5
CLASSES = {
    "ADI": "adipose", "BACK": "background", "DEB": "debris", "LYM": "lymphocytes", "MUC": "mucus",
    "MUS": "smooth muscle", "NORM": "normal mucosa", "STR": "stroma", "TUM": "tumour",
}  # fmt: skip
SETS = {"NCT-CRC-HE-100K": "train", "NCT-CRC-HE-100K-NONORM": "train", "CRC-VAL-HE-7K": "test"}
"""Part of the published split by folder."""


def build(
    source: Path,
    out: Path,
    patch_size: int = 224,
    codec: Codec = "png",
    seed: int = 0,
    jobs: int = 1,
    allow_duplicates: Sequence[str] = (),
) -> PatchDataset:
    """Write the dataset folder with the split ``published``.

    Args:
        source: Folder that holds the sets' folders.
        out: Dataset folder to write.
        patch_size: Edge of a stored patch in pixels, at most 224.
        codec: ``png``, ``jpg`` or ``webp``.
        seed: Not used; the split is the published one.
        jobs: Processes.
        allow_duplicates: Patients whose pictures may lie in several parts of the split; ``["*"]`` for all.

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
                rows.append(
                    {
                        "image": path.relative_to(source).as_posix(), "key": f"{name}/{path.stem.replace('.', '-')}",
                        "patient": name, "class": CLASSES[folder.name], "set": name,
                    }
                )  # fmt: skip
    if not rows:
        raise UserError(f"{source} holds no .tif in {there}.")
    settings = ImportSettings(
        out=str(out), root=str(source), name="nct-crc", key_column="key", extra=["set"], patch_size=patch_size,
        source_mpp=SOURCE_MPP, codec=codec, jobs=jobs, patches_per_shard=4096,
        allow_duplicates=list(allow_duplicates),
    )  # fmt: skip
    provenance = {
        "source": "NCT-CRC-HE-100K and CRC-VAL-HE-7K (Kather et al. 2018), Zenodo 1214456", "licence": "CC BY 4.0",
        "patients": "not known; each set stands as one patient, so that no split can divide it",
        "recipe": "shards/nct_crc.py",
    }  # fmt: skip
    split = ({name: SETS[name] for name in there}, {"kind": "as published, by set"})
    return import_images(settings, pd.DataFrame(rows), provenance=provenance, splits={"published": split})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the recipe; returns the folder and its counts."""
    parser = argparse.ArgumentParser(prog="latent-medi shards nct-crc", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=path_argument, help="folder that holds NCT-CRC-HE-100K and CRC-VAL-HE-7K")
    parser.add_argument("out", type=path_argument, help="dataset folder to write")
    parser.add_argument("--patch-size", type=int, default=224, help="edge of a stored patch in pixels (default 224)")
    parser.add_argument("--codec", choices=CODECS, default="png", help="png is lossless (default)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--allow-duplicates", nargs="+", default=[], metavar="PATIENT",
        help="whose pictures may lie in several parts of the split under different patients; '*' for all",
    )  # fmt: skip
    a = parser.parse_args(argv)
    dataset = build(a.source, a.out, a.patch_size, a.codec, jobs=a.jobs, allow_duplicates=a.allow_duplicates)
    print(dataset.counts("class", "set").to_string())
    return {
        "folder": str(dataset.folder), "patches": len(dataset), "splits": dataset.info["splits"]["published"]["counts"],
    }  # fmt: skip
