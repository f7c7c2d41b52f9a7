"""Tiles named by TCGA barcode (such as MoNuSeg's 1000 × 1000 px at 40×), with a manifest of clinical fields.

    python shards/tcga_tiles.py SOURCE OUT …

is ``latent-medi shards tcga-tiles SOURCE OUT …``; the recipe is ``latent_medi/recipes/tcga_tiles.py``.
"""

from latent_medi.recipes.tcga_tiles import main

if __name__ == "__main__":
    main()
