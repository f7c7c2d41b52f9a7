"""An experiment whose plan names tasks: what each model makes, and what the evaluation distinguishes."""

from __future__ import annotations

from pathlib import Path

from parts import make_cohort

from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds.datasets import make_plans
from latent_medi.experiment.settings import ExperimentSettings

TASKS = {"pair": ["benign", "tumour"]}


def test_the_tasks_of_the_plan_are_the_evaluations(tmp_path: Path) -> None:
    data = make_cohort(tmp_path / "data", ("aster", "birch"))
    settings = ExperimentSettings(data=str(tmp_path / "data"), plan={"tasks": TASKS})
    experiment = Experiment(settings)
    assert experiment.evaluation.medi_protocol.tasks == TASKS
    plans = make_plans(experiment)
    train = data.index[data.index["split_main"] == "train"]
    real = train.groupby(["class", "site"], observed=True).size().to_dict()
    medi = {(row["class"], row["site"]): row["count"] for row in plans["medi"].to_dict("records")}
    assert medi == real  # every class is at both sites
    assert (
        plans["cls"].groupby("class")["count"].sum().to_dict() == train.groupby("class", observed=True).size().to_dict()
    )
    settings.evaluate = {"medi_protocol": {"tasks": {"other": ["tumour", "benign"]}, "seeds": 2}}
    protocol = Experiment(settings).evaluation.medi_protocol
    assert (list(protocol.tasks), protocol.seeds) == (["other"], 2)
