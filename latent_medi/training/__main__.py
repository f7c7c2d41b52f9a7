"""``accelerate launch -m latent_medi.training`` equals ``accelerate launch train.py``."""

from __future__ import annotations

import sys

from latent_medi.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
