"""``accelerate launch -m latent_medi.training`` equals ``accelerate launch train.py``."""

from __future__ import annotations

import sys

from latent_medi.cli import main
from latent_medi.core.processes import run_program

if __name__ == "__main__":
    run_program(lambda: main(["train", *sys.argv[1:]]))
