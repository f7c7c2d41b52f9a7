"""PanNuke: 256 × 256 px of nineteen tissues at 0.25 µm per pixel, in three folds of arrays.

    python shards/pannuke.py SOURCE OUT …

is ``latent-medi shards pannuke SOURCE OUT …``; the recipe is ``latent_medi/recipes/pannuke.py``.
"""

from latent_medi.recipes.pannuke import main

if __name__ == "__main__":
    main()
