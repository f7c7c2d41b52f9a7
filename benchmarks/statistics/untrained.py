"""What is said after 60 training steps: no verdict, with its reasons, and no selection of such samples.

    python benchmarks/statistics/untrained.py [--out runs/untrained]
        [--prostate FOLDER --taef2 FOLDER --squeezenet FOLDER]

Runs the demo, and with the three folders the experiment on prostate biopsies at 64 px, and fails where an experiment
gives a verdict or `select` chooses from the candidate's samples. Some minutes each on two CPU cores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from latent_medi.core.errors import UserError
from latent_medi.evaluation.results import read_metrics
from latent_medi.selection.select import select
from latent_medi.selection.settings import SelectSettings

STEPS = ["train.max_steps=60", "seen_per_cell=6"]


def tried(name: str, out: Path, words: list[str], encoder: str, weights: str = "") -> bool:
    """Whether an experiment's result is no verdict and its samples are not selected from; prints both."""
    command = [sys.executable, "-m", "latent_medi.cli", "run", *words, *STEPS, f"out={out}"]
    subprocess.run(command, check=True)
    headline = read_metrics(out).headline
    assert headline is not None
    print(f"\n{name}: {headline.verdict.sentence}")
    try:
        settings = SelectSettings(
            data=str(out / "synthetic" / "medi"), real=str(out / "data"), encoder=encoder, weights=weights,
            cache=str(out / "features"), replace=True,
        )  # fmt: skip
        chosen = select(settings).result.total.chosen
        print(f"{name}: select chose {chosen} samples")
    except UserError as error:
        print(f"{name}: select refuses: {error}")
        return headline.verdict.answer == "no verdict"
    return False


def main() -> None:
    """Try both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/untrained"))
    for name in ("prostate", "taef2", "squeezenet"):
        parser.add_argument(f"--{name}", default="")
    given = parser.parse_args()
    held = [tried("demo", given.out / "demo", ["--config", "demo/experiment", "unseen_per_cell=60"], "demo")]
    if given.prostate:
        words = ["--config", "prostate/64px", f"source={given.prostate}", f"autoencoder={given.taef2}"]
        words += [f"weights.squeezenet={given.squeezenet}", "unseen_per_cell=40"]
        held.append(tried("prostate", given.out / "prostate", words, "squeezenet", given.squeezenet))
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
