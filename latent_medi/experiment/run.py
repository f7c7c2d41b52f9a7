"""Running an experiment: its stages in order, each remembered, from one configuration.

``latent-medi run`` takes any dataset that a recipe makes; ``latent-medi demo`` is the same on procedural tissue whose
truth is known; ``latent-medi benchmark-shift`` runs one experiment per level.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_medi.core import config
from latent_medi.core.errors import UserError, nearest
from latent_medi.core.files import write_json
from latent_medi.core.locks import output_lock
from latent_medi.core.processes import RUNNER_OPTIONS
from latent_medi.core.progress import duration
from latent_medi.experiment.commands import resumable
from latent_medi.experiment.dry_run import dry_run
from latent_medi.experiment.experiment import COMPARISON, Experiment
from latent_medi.experiment.kinds import declare
from latent_medi.experiment.kinds.datasets import split_for_checks
from latent_medi.experiment.launching import launching
from latent_medi.experiment.nodes import follow, leading
from latent_medi.experiment.preflight import preflight
from latent_medi.experiment.settings import DemoSettings, ExperimentSettings

_FILES = (
    "settings.yaml",
    "headline.json",
    "encode*.yaml",
    "train-*.yaml",
    "classifier-*.yaml",
    "sample-*.yaml",
    "embed.yaml",
    "autoencoder.yaml",
    "real_classifier.yaml",
    "image_classifier.yaml",
)


def demo(settings: DemoSettings) -> dict[str, Any]:
    """Run the demo; returns the headline."""
    own = {"out": settings.out, "seed": settings.seed, "replace": settings.replace}
    values = config.merge(config.load(ExperimentSettings, Path(settings.settings)), own)
    return run(config.make(ExperimentSettings, values, settings.settings))


def run_changed(name: str, changes: Mapping[str, Any], by_user: Mapping[str, Any]) -> dict[str, Any]:
    """Run a packaged configuration, or a path, with a program's changes put over it, and then the user's."""
    by_user = config.partial(ExperimentSettings, by_user, "changes", "changes.")
    values = config.load(ExperimentSettings, Path(name))
    known = config.make(ExperimentSettings, config.merge(values, by_user), name).models
    if unknown := [model for model in changes.get("models", {}) if model not in known]:
        raise UserError(f"models names {unknown[0]!r}, which {name} does not have; {nearest(unknown[0], list(known))}.")
    return run(config.make(ExperimentSettings, config.merge(config.merge(values, changes), by_user), name))


def take_part(settings: ExperimentSettings) -> bool:
    """Take part in an experiment that another node runs, if the launcher started this process for that; returns whether
    it did. A dry run is node 0's alone."""
    if RUNNER_OPTIONS not in os.environ or not (where := launching(settings.launch_processes)).node:
        return False
    if not settings.dry_run:
        with resumable():
            follow(where)
    return True


def run(settings: ExperimentSettings) -> dict[str, Any]:
    """Run every stage that is not finished.

    Returns:
        The headline, which is also printed; without the stage "evaluate", ``out``, and ``seconds`` by stage. With
        ``dry_run`` what the experiment will take.

    Raises:
        UserError: Settings that cannot be followed; a folder that another job writes; or, before anything is removed,
            latents, models or samples in the folder that were made from others.
    """
    if settings.dry_run:
        return dry_run(settings)
    where = launching(settings.launch_processes)
    with resumable(), leading(where) as leader, output_lock(settings.out):
        return _run(Experiment(settings, where, leader))


def _run(experiment: Experiment) -> dict[str, Any]:
    settings = experiment.settings
    stages, folder = experiment.stages, experiment.folder
    declare(experiment)
    checked = experiment.has_data
    with split_for_checks(experiment) if checked else nullcontext():
        declare(experiment)
        if not settings.replace:
            experiment.check_stages()
        if checked:  # before anything is removed
            preflight(experiment)
        stages.begin(*_FILES)
    if not checked:
        stages.run("shards")
        with split_for_checks(experiment):
            declare(experiment)
            if not settings.replace:
                experiment.check_stages()
            preflight(experiment)
    config.save_settings(replace(settings, replace=False), folder / "settings.yaml")
    if experiment.has("corpus"):  # what is trained on it is known once it is made
        stages.run(*(name for name in ("shards", "corpus") if name not in stages.seconds))
        declare(experiment)
        if not settings.replace:
            experiment.check_stages()
    stages.run(*(name for name in settings.stages if name not in stages.seconds))
    total = duration(sum(stages.seconds.values()))
    if experiment.has("image_classifier"):
        from latent_medi.image_classifier.comparison import comparison_text, read_comparison

        print(f"\n{comparison_text(read_comparison(folder / COMPARISON))}")
    if not experiment.has("evaluate"):
        print(f"\n{', '.join(settings.stages)} in {folder}: {total} in all")
        return {"out": settings.out, "seconds": stages.seconds}

    from latent_medi.evaluation.results import read_metrics
    from latent_medi.evaluation.summary import evaluation_text, headline, headline_json

    metrics = read_metrics(folder)
    record = headline(metrics, stages.seconds)
    content = headline_json(record)
    write_json(folder / "headline.json", content)
    page = f" Report: {folder / 'report.html'}" if experiment.has("report") else ""
    print(f"\n{evaluation_text(metrics, record)}\n\n{total} in all.{page}")
    return content
