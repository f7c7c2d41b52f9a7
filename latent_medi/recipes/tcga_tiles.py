"""Tiles named by TCGA barcode (such as MoNuSeg's 1000 × 1000 px at 40×), with a manifest of clinical fields.

    latent-medi shards tcga-tiles SOURCE OUT --patch-size 256 --mpp 0.5

SOURCE holds ``manifest.csv`` (columns image, case, source_site, project_id, race, gender, age_at_index) and the images.
The class is the project; the site is the institution, aliases merged. Resolution is nominal: 40× is taken as 0.25 µm
per pixel (``--source-mpp``), since the tiles record none.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latent_medi.core.paths import path_argument
from latent_medi.metadata.tables import read_table, require_columns
from latent_medi.metadata.tcga import clinical_fields, fields_by_patient, institution, slide_key
from latent_medi.shards.dataset import PatchDataset
from latent_medi.shards.format.codec import CODECS
from latent_medi.shards.importing.images import import_images
from latent_medi.shards.settings import Codec, ImportSettings

SOURCE_MPP = 0.25


def build(
    source: Path,
    out: Path,
    patch_size: int = 256,
    codec: Codec = "png",
    seed: int = 0,
    jobs: int = 1,
    mpp: float = 0.5,
    source_mpp: float = SOURCE_MPP,
) -> PatchDataset:
    """Write the dataset folder, each tile cut into patches side by side.

    Args:
        source: Folder with ``manifest.csv`` and the tiles.
        out: Dataset folder to write.
        patch_size: Edge of a stored patch in pixels.
        codec: ``png``, ``jpg`` or ``webp``.
        seed: Not used; the recipe leaves splitting to ``latent-medi split``.
        jobs: Processes.
        mpp: µm per pixel of the stored patches.
        source_mpp: µm per pixel of the tiles.

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
    table = table.rename(columns={"project": "class"})
    settings = ImportSettings(
        table=str(manifest), out=str(out), name="tcga-tiles", key_column="key", slide_column="key",
        categorical=["site", *(n for n in ("gender", "race") if n in table)],
        continuous=["age"] if "age" in table else [], units={"age": "years"} if "age" in table else {},
        patch_size=patch_size, mpp=mpp, source_mpp=source_mpp, tile=True, codec=codec, jobs=jobs,
    )  # fmt: skip
    provenance = {
        "source": "tiles of TCGA diagnostic and frozen slides, named by barcode",
        "resolution": f"nominal, {source_mpp} µm per source pixel; the source records none",
        "recipe": "shards/tcga_tiles.py",
    }
    return import_images(settings, table, provenance=provenance)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Command line of the recipe; returns the folder and its counts."""
    parser = argparse.ArgumentParser(prog="latent-medi shards tcga-tiles", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=path_argument, help="folder with manifest.csv and the tiles")
    parser.add_argument("out", type=path_argument, help="dataset folder to write")
    parser.add_argument("--patch-size", type=int, default=256, help="edge of a stored patch in pixels (default 256)")
    parser.add_argument("--mpp", type=float, default=0.5, help="µm per pixel of the stored patches (default 0.5)")
    parser.add_argument("--source-mpp", type=float, default=SOURCE_MPP, help="µm per pixel of the tiles (default 0.25)")
    parser.add_argument("--codec", choices=CODECS, default="png", help="png is lossless (default)")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    a = parser.parse_args(argv)
    dataset = build(a.source, a.out, a.patch_size, a.codec, jobs=a.jobs, mpp=a.mpp, source_mpp=a.source_mpp)
    print(dataset.counts("class", "site", "patients").to_string())
    return {"folder": str(dataset.folder), "patches": len(dataset)}
