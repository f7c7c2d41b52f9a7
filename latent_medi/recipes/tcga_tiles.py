"""Tiles named by TCGA barcode (such as MoNuSeg's 1000 × 1000 px at 40×), with a manifest of clinical fields.

    latent-medi shards tcga-tiles SOURCE OUT --patch-size 256 --mpp 0.5

SOURCE holds ``manifest.csv`` (columns image, case, source_site, project_id, race, gender, age_at_index) and the images.
The class is the project, the site the institution, aliases merged, and ``tss`` the barcode's site code. Resolution is
nominal: 40× is taken as 0.25 µm per pixel (``--source-mpp``), since the tiles record none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from latent_medi.metadata.tables import read_table, require_columns
from latent_medi.metadata.tcga import clinical_fields, fields_by_patient, institution, parse_barcode, slide_key
from latent_medi.recipes._common import Options, import_options, recipe_parser, run_recipe
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import ImportSettings

SOURCE_MPP = 0.25


def build(
    source: Path,
    out: Path,
    patch_size: int = 256,
    mpp: float = 0.5,
    source_mpp: float = SOURCE_MPP,
    **options: Unpack[Options],
) -> PatchDataset:
    """Write the dataset folder, each tile cut into a grid of patches.

    Args:
        source: Folder with ``manifest.csv`` and the tiles.
        out: Dataset folder to write.
        patch_size: Edge of a stored patch in pixels.
        mpp: µm per pixel of the stored patches.
        source_mpp: µm per pixel of the tiles.
        options: See :class:`~latent_medi.recipes._common.Options`.

    Raises:
        UserError: The source has another layout.
    """
    manifest = Path(source) / "manifest.csv"
    table = read_table(manifest)
    require_columns(table, ["image", "case", "source_site", "project_id"], str(manifest))
    known = clinical_fields(table)
    fields_by_patient(known)  # refuses a patient whose tiles contradict each other
    table = table[["image", "source_site"]].join(known)
    table["key"] = [slide_key(name) for name in table["image"]]
    table["site"] = [institution(name)[0] for name in table["source_site"]]
    table["tss"] = [parse_barcode(name).tss for name in table["image"]]
    table = table.rename(columns={"project": "class"})
    units = {name: unit for name, unit in {"age": "years"}.items() if name in table}
    settings = ImportSettings(
        table=str(manifest),
        name="tcga-tiles",
        key_column="key",
        slide_column="key",
        categorical=["site", "tss", *(name for name in ("gender", "race") if name in table)],
        continuous=list(units),
        units=units,
        mpp=mpp,
        source_mpp=source_mpp,
        tile=True,
        **import_options(out, patch_size, options),
    )
    provenance = {
        "source": "tiles of TCGA diagnostic and frozen slides, named by barcode",
        "resolution": f"nominal, {source_mpp} µm per source pixel; the source records none",
        "recipe": "shards/tcga_tiles.py",
    }
    return import_images(settings, table, provenance=provenance)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the recipe; returns the folder and its counts."""
    source = "folder with manifest.csv and the tiles"
    parser = recipe_parser("tcga-tiles", __doc__, source, 256, published_split=False)
    parser.add_argument("--mpp", type=float, default=0.5, help="µm per pixel of the stored patches (default 0.5)")
    parser.add_argument("--source-mpp", type=float, default=SOURCE_MPP, help="µm per pixel of the tiles (default 0.25)")
    return run_recipe(build, parser, argv)
