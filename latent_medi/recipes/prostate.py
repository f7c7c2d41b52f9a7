"""Prostate biopsies from two hospitals (PANDA: Karolinska and Radboud), with one class × hospital combination held out.

    latent-medi shards prostate SOURCE OUT --patch-size 64

SOURCE holds ``manifest.csv`` (columns image, patient, class, site, isup_grade) and the images it names: square RGB
patches of whole biopsies. ``class`` is the grade of the biopsy, not of the patch: a patch of gleason4 can show benign
tissue. ``patient`` is the biopsy, the finest unit that the source tells apart; patches overlap their neighbours, so
only a split by biopsy is honest. The source is CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.core.paths import path_argument
from latent_medi.metadata.splits import hold_out
from latent_medi.metadata.tables import read_table, require_columns
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import CODECS
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import Codec, ImportSettings

HELD_OUT = ({"class": "gleason4", "site": "radboud"},)
"""Combinations whose patients are all in the test part: the model never sees them."""
TEST_SHARE = 0.3
VALIDATION_SHARE = 0.1
VALIDATION_FROM = 6
"""Training biopsies that a class × site cell must have before some validate; smaller cells need each of them to train.
"""
SOURCE_MPP = 1.0
"""Nominal: biopsies scanned near 0.5 µm per pixel, patches halved. The source records no resolution per patch."""


def split_patients(table: pd.DataFrame, seed: int = 0) -> dict[str, str]:
    """``train``, ``val`` or ``test`` by patient.

    In each seen class × site cell about 30% of the patients (at least one) test, a tenth of the rest validate where
    there are enough, and the others train. Held-out combinations are all test.

    Args:
        table: A row per patch with patient, class and site.
        seed: Seed of the shuffle, which is by a hash of the patient's name.

    Raises:
        UserError: A cell has a single patient, so it cannot both train and test; or a patient lies in two cells.
    """
    unseen = set(table.loc[hold_out(table, HELD_OUT), "patient"])
    parts = dict.fromkeys(sorted(unseen), "test")
    cells = table[~table["patient"].isin(unseen)].drop_duplicates(["patient", "class", "site"])
    if cells["patient"].duplicated().any():
        raise UserError(
            f"Patient {cells.loc[cells['patient'].duplicated(), 'patient'].iloc[0]!r} is in two class × site cells."
        )
    for (tumour, site), rows in cells.groupby(["class", "site"], sort=True):
        patients = sorted(rows["patient"], key=lambda p: hashlib.sha256(f"{seed}/{p}".encode()).hexdigest())
        tests = max(1, round(TEST_SHARE * len(patients)))
        trains = len(patients) - tests
        if trains < 1:
            raise UserError(f"{tumour} × {site} has {len(patients)} patients: too few to train and test.")
        validates = max(1, round(VALIDATION_SHARE * trains)) if trains >= VALIDATION_FROM else 0
        names = ["test"] * tests + ["val"] * validates + ["train"] * (trains - validates)
        parts |= dict(zip(patients, names, strict=True))
    return parts


def build(
    source: Path,
    out: Path,
    patch_size: int = 64,
    codec: Codec = "png",
    seed: int = 0,
    jobs: int = 1,
    patches_per_shard: int = 512,
    allow_duplicates: Sequence[str] = (),
) -> PatchDataset:
    """Write the dataset folder with the split ``main``.

    Args:
        source: Folder with ``manifest.csv`` and the images.
        out: Dataset folder to write.
        patch_size: Edge of a stored patch in pixels; each image is scaled down whole.
        codec: ``png``, ``jpg`` or ``webp``.
        seed: Seed of the split.
        jobs: Processes.
        patches_per_shard: Patches per tar.
        allow_duplicates: Patients whose pictures may lie in several parts of the split; ``["*"]`` for all.

    Raises:
        UserError: The source has another layout, or more than 1% of its images are bad.
    """
    manifest = Path(source) / "manifest.csv"
    table = read_table(manifest)
    require_columns(table, ["image", "patient", "class", "site", "isup_grade"], str(manifest))
    # Biopsy and patch number, without the folder that all images share.
    table["key"] = [
        f"{patient}/{Path(image).stem.rpartition('_')[2]}"
        for patient, image in zip(table["patient"], table["image"], strict=True)
    ]
    settings = ImportSettings(
        table=str(manifest), out=str(out), name="prostate", key_column="key", categorical=["site"],
        extra=["isup_grade"],
        patch_size=patch_size, source_mpp=SOURCE_MPP, codec=codec, jobs=jobs, patches_per_shard=patches_per_shard,
        allow_duplicates=list(allow_duplicates),
    )  # fmt: skip
    recipe: dict[str, Any] = {
        "kind": "by patient within class × site", "seed": seed, "test_share": TEST_SHARE,
        "validation_share": VALIDATION_SHARE, "validation_from": VALIDATION_FROM,
        "held_out": [dict(c) for c in HELD_OUT],
    }  # fmt: skip
    provenance: Mapping[str, Any] = {
        "source": "PANDA challenge (Karolinska Institutet, Radboud UMC), patches of biopsies with their grade group",
        "licence": "CC BY-NC-SA 4.0",
        "resolution": f"nominal, {SOURCE_MPP} µm per source pixel; the source records none",
        "recipe": "shards/prostate.py",
    }
    return import_images(settings, table, provenance=provenance, splits={"main": (split_patients(table, seed), recipe)})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the recipe; returns the folder and its counts."""
    parser = argparse.ArgumentParser(prog="latent-medi shards prostate", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=path_argument, help="folder with manifest.csv and the images")
    parser.add_argument("out", type=path_argument, help="dataset folder to write")
    parser.add_argument("--patch-size", type=int, default=64, help="edge of a stored patch in pixels (default 64)")
    parser.add_argument("--codec", choices=CODECS, default="png", help="png is lossless (default)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default 0)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "--allow-duplicates", nargs="+", default=[], metavar="PATIENT",
        help="whose pictures may lie in several parts of the split under different patients; '*' for all",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    dataset = build(
        arguments.source,
        arguments.out,
        arguments.patch_size,
        arguments.codec,
        arguments.seed,
        arguments.jobs,
        allow_duplicates=arguments.allow_duplicates,
    )
    print(dataset.counts("class", "site", "patients").to_string())
    return {"folder": str(dataset.folder), "patches": len(dataset), "splits": dataset.info["splits"]["main"]["counts"]}
