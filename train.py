"""Train a denoiser: the entry point for `accelerate launch`.

accelerate launch --config_file configs/accelerate/cpu.yaml train.py --config demo/medi max_steps=20
accelerate launch --config_file configs/accelerate/two_nodes.yaml train.py --config tcga_ut/medi
"""

import sys

from latent_medi.cli import main
from latent_medi.core.processes import run_program

if __name__ == "__main__":
    run_program(lambda: main(["train", *sys.argv[1:]]))
