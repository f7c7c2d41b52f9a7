"""Generate the patches of a plan: the entry point for `accelerate launch`.

accelerate launch --config_file configs/accelerate/cpu.yaml sample.py model=runs/demo/medi/model plan=runs/demo/plan.csv
out=runs/demo/synthetic/medi
"""

import sys

from latent_medi.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
