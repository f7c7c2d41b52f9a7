"""The kinds of stages: for each a function that gives the stage of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.kinds import classifiers, datasets, models, results
from latent_medi.experiment.stages import Stage

KINDS: Mapping[str, Callable[[Experiment], Stage]] = {
    "shards": datasets.shards,
    "corpus": datasets.corpus,
    "audit": datasets.audit,
    "autoencoder": models.autoencoder,
    "encode": datasets.encode,
    "train": models.train,
    "classifier": models.classifier,
    "plan": datasets.plan,
    "sample": models.sample,
    "real_classifier": classifiers.real_classifier,
    "select": results.select,
    "image_classifier": classifiers.image_classifier,
    "evaluate": results.evaluate,
    "report": results.report,
}
"""In the order in which an experiment runs them. A stage's inputs are content, not paths, and hold nothing that changes
speed or memory alone."""


def declare(experiment: Experiment) -> None:
    """Define the experiment's stages from what is known of its data now."""
    for name in experiment.settings.stages:
        experiment.stages.add(name, KINDS[name](experiment))
