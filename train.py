"""Train a denoiser: the entry point for `accelerate launch`.

accelerate launch --config_file configs/accelerate/cpu.yaml train.py --config demo/medi max_steps=20
accelerate launch --config_file configs/accelerate/two_nodes.yaml train.py --config tcga_ut/medi
"""

import sys

from latent_medi.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
