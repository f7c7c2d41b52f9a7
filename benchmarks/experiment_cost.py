"""The hours that `run dry_run=true` announces, against those that the same experiment then takes on this machine.

    python benchmarks/experiment_cost.py [--quick] [--config NAME] [--json FILE] [key=value …]

The experiment is run up to its samples, after its dataset was made. Ratios are announced over taken: 1 is right, below
1 too little. The bound of 30 % is for stages of some minutes on a machine that does nothing else.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from output import options, report

from latent_medi.core import config
from latent_medi.experiment.nodes import cores_shared
from latent_medi.experiment.run import run
from latent_medi.experiment.settings import ExperimentSettings

TIMED = ("encode", "train", "sample")


def main() -> None:
    parser = options(__doc__, "a quarter of the demo's updates")
    parser.add_argument("--config", default="demo/experiment", help="the experiment")
    parser.add_argument("changes", nargs="*", help="settings of the experiment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="latent-medi-") as folder:
        words = ["--config", arguments.config, f"out={Path(folder) / 'run'}"]
        words += ["stages=[shards, audit, encode, train, plan, sample]", "launch_processes=1"]
        words += ["train.max_steps=425"] if arguments.quick else []
        made = [*words, *arguments.changes]
        run(config.parse(ExperimentSettings, [*made, "stages=[shards]"], "run"))
        announced = run(config.parse(ExperimentSettings, [*made, "dry_run=true"], "run"))
        taken = run(config.parse(ExperimentSettings, made, "run"))["seconds"]
    result: dict[str, float] = {}
    for stage in TIMED:
        seconds = [row["seconds"] for row in announced["stages"] if row["stage"] == stage]
        at_once, _ = cores_shared(len(seconds))
        waves = [max(seconds[i : i + at_once]) for i in range(0, len(seconds), at_once)]
        result[f"{stage}_announced_s"] = sum(waves)
        result[f"{stage}_taken_s"] = taken[stage]
        result[f"{stage}_announced_over_taken"] = sum(waves) / taken[stage]
    result["announced_over_taken"] = announced["seconds"] / sum(taken[stage] for stage in TIMED)
    report(result, arguments.json)


if __name__ == "__main__":
    main()
