"""Camelyon17-WILDS: lymph-node patches from five hospitals, tumour or not in the middle of the patch.

    python shards/camelyon17_wilds.py SOURCE OUT …

is ``latent-medi shards camelyon17-wilds SOURCE OUT …``; the recipe is ``latent_medi/recipes/camelyon17_wilds.py``.
"""

from latent_medi.recipes.camelyon17_wilds import main

if __name__ == "__main__":
    main()
