"""TCGA-UT: patches of 128 µm of 32 cancer types, from the Hub's WebDataset tars or the class folders of Zenodo.

    python shards/tcga_ut.py SOURCE OUT …

is ``latent-medi shards tcga-ut SOURCE OUT …``; the recipe is ``latent_medi/recipes/tcga_ut.py``.
"""

from latent_medi.recipes.tcga_ut import main

if __name__ == "__main__":
    main()
