"""Prostate biopsies from two hospitals (PANDA: Karolinska and Radboud), with one class × hospital combination held out.

    latent-medi shards prostate SOURCE OUT --patch-size 64

SOURCE holds ``manifest.csv`` (columns image, patient, class, site, isup_grade) and the images it names: square RGB
patches of whole biopsies. ``class`` is the grade of the biopsy, not of the patch: a patch of gleason4 can show benign
tissue. ``patient`` is the biopsy, since the source names no patients; patches overlap their neighbours, so a split has
to be by biopsy at least. The source is CC BY-NC-SA 4.0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import pandas as pd

from latent_medi.core.errors import UserError
from latent_medi.metadata.schema import Schema
from latent_medi.metadata.splits import hold_out
from latent_medi.metadata.tables import read_table, require_columns
from latent_medi.recipes._common import Options, import_options, recipe_parser, run_recipe
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.listing import Listing, in_shards
from latent_medi.shards.settings import ImportSettings

HELD_OUT = ({"class": "gleason4", "site": "radboud"},)
"""Combinations whose patients are all in the test part, so that no model is trained on them."""
MANIFEST = "manifest.csv"
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
        UserError: A cell has a single patient, so it cannot both train and test; or a patient is in two cells.
    """
    unseen = set(table.loc[hold_out(table, HELD_OUT), "patient"])
    parts = dict.fromkeys(sorted(unseen), "test")
    cells = table[~table["patient"].isin(unseen)].drop_duplicates(["patient", "class", "site"])
    if cells["patient"].duplicated().any():
        patient = cells.loc[cells["patient"].duplicated(), "patient"].iloc[0]
        raise UserError(f"Patient {patient!r} is in two class × site cells.")
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


def _read(manifest: Path) -> pd.DataFrame:
    table = read_table(manifest)
    require_columns(table, ["image", "patient", "class", "site", "isup_grade"], str(manifest))
    # Biopsy and patch number, without the folder that all images share.
    table["key"] = [
        f"{patient}/{Path(image).stem.rpartition('_')[2]}"
        for patient, image in zip(table["patient"], table["image"], strict=True)
    ]
    return table


def listing(source: Path, patch_size: int = 64, **options: Unpack[Options]) -> Listing:
    """The patches that :func:`build` will import if no image is bad; arguments as there."""
    table = _read(Path(source) / MANIFEST)
    parts = split_patients(table, options.get("seed", 0))
    index = table[["key", "patient", "class", "site"]].assign(split_main=table["patient"].map(parts))
    index["slide"] = index["patient"]
    counts = in_shards(len(index), ImportSettings.patches_per_shard)
    return Listing(index, Schema.from_table(index, "class", ["site"]), counts)


def build(source: Path, out: Path, patch_size: int = 64, **options: Unpack[Options]) -> PatchDataset:
    """Write the dataset folder with the split ``main``.

    Args:
        source: Folder with ``manifest.csv`` and the images.
        out: Dataset folder to write.
        patch_size: Edge of a stored patch in pixels; each image is scaled down whole.
        options: See :class:`~latent_medi.recipes._common.Options`.

    Raises:
        UserError: The source has another layout, or more than 1% of its images are bad.
    """
    manifest = Path(source) / MANIFEST
    table = _read(manifest)
    settings = ImportSettings(
        table=str(manifest),
        name="prostate",
        key_column="key",
        categorical=["site"],
        extra=["isup_grade"],
        source_mpp=SOURCE_MPP,
        **import_options(out, patch_size, options),
    )
    seed = options.get("seed", 0)
    recipe = {
        "kind": "by patient within class × site",
        "seed": seed,
        "test_share": TEST_SHARE,
        "validation_share": VALIDATION_SHARE,
        "validation_from": VALIDATION_FROM,
        "held_out": [dict(c) for c in HELD_OUT],
    }
    provenance = {
        "source": "PANDA challenge (Karolinska Institutet, Radboud UMC), patches of biopsies with their grade group",
        "licence": "CC BY-NC-SA 4.0",
        "resolution": f"nominal, {SOURCE_MPP} µm per source pixel; the source records none",
        "recipe": "shards/prostate.py",
    }
    return import_images(settings, table, provenance=provenance, splits={"main": (split_patients(table, seed), recipe)})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the recipe; returns the folder and its counts."""
    parser = recipe_parser("prostate", __doc__, "folder with manifest.csv and the images", 64)
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default 0)")
    return run_recipe(build, parser, argv, "main")
