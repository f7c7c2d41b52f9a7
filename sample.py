"""Generate the patches of a plan: the entry point for `accelerate launch`.

accelerate launch --config_file configs/accelerate/cpu.yaml sample.py model=runs/demo/medi/model plan=runs/demo/plan.csv
out=runs/demo/synthetic/medi
"""

import sys

from latent_medi.cli import main
from latent_medi.core.processes import run_program

if __name__ == "__main__":
    run_program(lambda: main(["sample", *sys.argv[1:]]))
