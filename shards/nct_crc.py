"""NCT-CRC-HE: nine tissue classes of colorectal cancer, 224 × 224 px at 0.5 µm per pixel.

    python shards/nct_crc.py SOURCE OUT …

is ``latent-medi shards nct-crc SOURCE OUT …``; the recipe is ``latent_medi/recipes/nct_crc.py``.
"""

from latent_medi.recipes.nct_crc import main

if __name__ == "__main__":
    main()
