"""Prostate biopsies from two hospitals (PANDA: Karolinska and Radboud), with one class × hospital combination held out.

    python shards/prostate.py SOURCE OUT …

is ``latent-medi shards prostate SOURCE OUT …``; the recipe is ``latent_medi/recipes/prostate.py``.
"""

from latent_medi.recipes.prostate import main

if __name__ == "__main__":
    main()
