"""Camelyon17-WILDS: lymph-node patches from five hospitals, with or without tumour in the middle.

    latent-medi shards camelyon17-wilds SOURCE OUT --patch-size 96

SOURCE is the unpacked ``camelyon17_v1.0``: ``metadata.csv`` and ``patches/patient_NNN_node_N/…png`` of 96 × 96 px. The
centre is the site. ``split_wilds`` is the published one by hospital (train and in-distribution validation at centres 0,
3, 4; validation at 1; test at 2); since its in-distribution validation shares patients with training, those patches
train here. The data are CC0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from latent_medi.core.errors import UserError
from latent_medi.metadata.tables import read_table, require_columns
from latent_medi.recipes._common import Options, import_options, recipe_parser, run_recipe
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import ImportSettings

SOURCE_MPP = 0.97
"""Nominal: patches were read at level 2 of slides scanned near 0.243 µm per pixel; the source records none."""
PARTS = {"1": "val", "2": "test"}
"""Part of the published split by centre; the other centres train."""


def build(source: Path, out: Path, patch_size: int = 96, **options: Unpack[Options]) -> PatchDataset:
    """Write the dataset folder with the split ``wilds``.

    Args:
        source: The unpacked folder.
        out: Dataset folder to write.
        patch_size: Edge of a stored patch in pixels, at most 96.
        options: See :class:`~latent_medi.recipes._common.Options`.

    Raises:
        UserError: The source has another layout.
    """
    metadata = Path(source) / "metadata.csv"
    table = read_table(metadata)
    needed = ["patient", "node", "x_coord", "y_coord", "tumor", "slide", "center"]
    require_columns(table, needed, str(metadata))
    if bad := sorted(set(table["tumor"]) - {"0", "1"}):
        raise UserError(f"{metadata}: tumor is 0 or 1, not {bad[:3]}.")
    patient = table["patient"].str.zfill(3)
    folder = "patient_" + patient + "_node_" + table["node"]
    place = "_x_" + table["x_coord"] + "_y_" + table["y_coord"]
    table["image"] = "patches/" + folder + "/patch_" + folder + place + ".png"
    table["key"] = folder + "/" + place.str.removeprefix("_")
    table["patient"] = "patient_" + patient
    table["slide"] = folder
    table["class"] = table["tumor"].map({"0": "normal", "1": "tumour"})
    table["site"] = "centre " + table["center"]
    parts = dict(zip(table["patient"], table["center"].map(PARTS).fillna("train"), strict=True))
    settings = ImportSettings(
        table=str(metadata),
        name="camelyon17-wilds",
        key_column="key",
        slide_column="slide",
        x_column="x_coord",
        y_column="y_coord",
        categorical=["site"],
        source_mpp=SOURCE_MPP,
        patches_per_shard=4096,
        **import_options(out, patch_size, options),
    )
    provenance = {
        "source": "Camelyon17-WILDS 1.0 (Koh et al. 2021; Bandi et al. 2018)",
        "licence": "CC0",
        "resolution": f"nominal, {SOURCE_MPP} µm per source pixel; the source records none",
        "positions": "x and y are those of the source, in pixels of level 2",
        "recipe": "shards/camelyon17_wilds.py",
    }
    recipe = {"kind": "by centre, as published", "val": "centre 1", "test": "centre 2"}
    return import_images(settings, table, provenance=provenance, splits={"wilds": (parts, recipe)})


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the recipe; returns the folder and its counts."""
    parser = recipe_parser("camelyon17-wilds", __doc__, "the unpacked camelyon17_v1.0", 96)
    return run_recipe(build, parser, argv, "wilds")
