"""``run dry_run=true``: what an experiment will take, and the checks before its first stage, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from latent_medi.core.errors import Incomplete
from latent_medi.core.records import encode
from latent_medi.doctor import examine
from latent_medi.experiment.cost import experiment_cost
from latent_medi.experiment.cost_records import cost_text
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds import declare
from latent_medi.experiment.launching import launching
from latent_medi.experiment.limits import check_limits
from latent_medi.experiment.preflight import check_fields, preflight
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.shards.dataset import PatchDataset


def dry_run(settings: ExperimentSettings) -> dict[str, Any]:
    """Print what an experiment will take, and run nothing.

    Returns:
        The same, JSON-able.

    Raises:
        UserError: What a run itself would refuse before its first stage.
        Incomplete: Something is missing that the experiment needs.
    """
    experiment = Experiment(settings, launching(settings.launch_processes))
    declare(experiment)
    if experiment.has_data:
        check_fields(experiment)
    divided = experiment.has_data and settings.split in PatchDataset.open(experiment.data).splits
    if divided and all(weights.found for weights in experiment_cost(experiment, measure=False).weights):
        preflight(experiment)  # before minutes are spent on measuring
    cost = experiment_cost(experiment, measure=True)
    result = {"out": settings.out, "bytes": cost.bytes, "planned": cost.planned, **encode(cost)}
    print(cost_text(cost))
    for finding in examine(Path(settings.out), hub=False):
        if finding.state == "bad":
            print(f"\n{finding.part}, {finding.name}: {finding.text}\n  {finding.remedy}")
    check_limits(settings, cost)
    if not settings.replace:
        experiment.check_stages()
    if cost.missing:
        raise Incomplete(f"The experiment cannot run yet: {'; '.join(cost.missing)}", result)
    return result
