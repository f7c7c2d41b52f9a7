"""Stages on the samples: selection, evaluation and the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.core.files import write_json
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.experiment.damaged_outputs import damaged_metrics
from latent_medi.experiment.experiment import IMAGE_CLASSIFIER, Experiment
from latent_medi.experiment.kinds.models import sample_models
from latent_medi.experiment.stages import Stage
from latent_medi.planning.plan import stable_seed
from latent_medi.selection.result import CombinationCounts, Selection
from latent_medi.shards.dataset import PatchDataset

_MORE = 1.1
"""What a further round generates over what is missing on average."""


def select(e: Experiment) -> Stage:
    """The best of each model's samples, as columns of their dataset folder and counts in ``selection-NAME.json``."""
    free = {"data", "real", "weights", "cache", "batch", "device", "workers", "replace"}
    settings = config.as_dict(e.selection(e.sampled[0].name))
    inputs = {key: value for key, value in settings.items() if key not in free and (key != "only" or value)}
    if e.selects_by_classifier:
        inputs["encoder"] = IMAGE_CLASSIFIER
    if e.settings.select_rounds > 1:
        inputs["rounds"] = e.settings.select_rounds
    outputs = {name: e.folder / f"selection-{name}.json" for name in e.synthetic}
    return Stage(
        lambda: _select(e, outputs),
        inputs,
        ("sample", *(e.needs("real_classifier") if e.selects_by_classifier else ())),
        by_model={name: (path.name,) for name, path in outputs.items()},
        damaged=lambda: [path for name, path in outputs.items() if not _has_selection(e, name)],
    )


def _has_selection(e: Experiment, name: str) -> bool:
    """Whether a model's samples have the selection: samples that were made again have lost it."""
    try:
        return e.selection_name in PatchDataset.open(e.synthetic[name]).selections
    except UserError:
        return False


def _embed_together(e: Experiment, settings: EvaluateSettings) -> None:
    """Have all processes, if there are several, embed the patches that an evaluation compares. This is by far its
    longest part; one process does the rest with the features that it finds in the cache."""
    if e.where.processes > 1:
        file = e.folder / "embed.yaml"
        config.save_settings(settings, file)
        e.run_commands({"embed": ["evaluate", "--embed", "--config", str(file)]})


def _select(e: Experiment, outputs: dict[str, Path]) -> None:
    from latent_medi.core.device import release_memory
    from latent_medi.planning.plan import read_plan, write_plan
    from latent_medi.selection.result import selection_text
    from latent_medi.selection.select import select as select_samples

    models = {model.name: model for model in e.sampled}
    chosen = e.selection(e.sampled[0].name)
    weights = {chosen.encoder: chosen.weights} if chosen.weights else {}
    own = replace(e.evaluation, encoders=[chosen.encoder], weights=weights, colour_free=chosen.colour_free, selected={})

    def select_now(name: str) -> Selection:
        _embed_together(e, own)
        return select_samples(e.selection(name))

    try:
        for name, path in outputs.items():
            if len(e.plans(name)) > 1:  # of a run that was broken off
                sample_models(e, [models[name]])
            selection = select_now(name)
            for number in range(len(e.plans(name)) + 1, e.settings.select_rounds + 1):
                if not any(cell.missing for cell in selection.result.cells):
                    break
                share = e.selection(name).share
                plan = longer_plan(read_plan(e.plans(name)[-1]), selection.result.cells, number, share)
                write_plan(plan, e.folder / f"plan-{name}-round-{number}.csv")
                sample_models(e, [models[name]])
                selection = select_now(name)
            write_json(path, selection.to_json())
            print(f"{name}: {selection_text(selection)}")
    finally:
        release_memory()


def longer_plan(plan: pd.DataFrame, cells: Sequence[CombinationCounts], number: int, share: float) -> pd.DataFrame:
    """A plan with further rows at its end: what a selection still wants, by the share of the patches that it accepted.

    Args:
        plan: The plan of the patches so far.
        cells: What was chosen of each combination.
        number: Of the round, which the seeds of the new rows depend on.
        share: Share of a combination's patches that the selection takes at most.

    Returns:
        The plan; a combination of which no patch was accepted is asked for as often again as so far.
    """
    rows = [plan]
    for cell in cells:
        of_cell = plan[(plan[list(cell.cell)] == pd.Series(cell.cell)).all(axis=1) & (plan["count"] > 0)]
        if not cell.missing or not len(of_cell):
            continue
        wanted = cell.missing / cell.acceptance if cell.accepted else cell.asked
        wanted = max(wanted, (cell.wanted or 0) / share - cell.asked)
        shares = of_cell["count"] / of_cell["count"].sum()
        counts = np.ceil(_MORE * wanted * shares).astype(int)
        seeds = [stable_seed(int(seed), "round", number) for seed in of_cell["seed"]]
        rows.append(of_cell.assign(count=counts, seed=seeds))
    return pd.concat(rows, ignore_index=True)


def evaluate(e: Experiment) -> Stage:
    """Every model's samples against real patients, as ``metrics.json``, ``predictions.csv`` and ``reference``."""
    free = {"real", "synthetic", "out", "cache", "batch", "device"}
    settings = config.as_dict(e.evaluation)
    # What earlier versions could not choose is left out where it is what they did.
    usual = config.as_dict(EvaluateSettings())
    free |= {key for key in ("only", "projection", "references") if settings[key] == usual[key]}
    if settings["downstream_protocol"] != "medi":
        settings["medi_protocol"] = {k: v for k, v in settings["medi_protocol"].items() if k not in ("tasks", "pools")}
    inputs = {key: value for key, value in settings.items() if key not in free}
    return Stage(
        lambda: _evaluate(e),
        inputs | {"synthetic": list(e.synthetic)},
        e.needs("select") or ("sample",),
        ("metrics.json",),
        # Cached features are found by content, and stay.
        extras=("predictions.csv", "per_class_distance.csv", "medi_results.csv", "medi_summary.csv", "reference"),
        damaged=lambda: damaged_metrics(e.folder / "metrics.json"),
    )


def _evaluate(e: Experiment) -> None:
    from latent_medi.core.device import release_memory
    from latent_medi.evaluation import evaluate as evaluation
    from latent_medi.evaluation.fidelity.memorisation import TooManyCopies

    _embed_together(e, e.evaluation)
    try:
        evaluation.evaluate(e.evaluation)
    except TooManyCopies:
        _report(e)  # which shows the copies
        raise
    finally:
        release_memory()  # another experiment of this process trains in processes of its own


def report(e: Experiment) -> Stage:
    """The page."""
    inputs = {"title": e.settings.title, "report_cells": e.settings.report_cells}
    return Stage(lambda: _report(e), inputs, (*e.needs("image_classifier"), "evaluate"), ("report.html",))


def _report(e: Experiment) -> None:
    from latent_medi.evaluation.results import read_metrics
    from latent_medi.report.render import render_report
    from latent_medi.report.settings import SECTIONS

    # What an earlier run compared may have been trained on other samples.
    left_out = () if e.has("image_classifier") else ("classifiers",)
    render_report(
        read_metrics(e.folder),
        e.folder / "report.html",
        title=e.settings.title,
        sections=[section for section in SECTIONS if section not in left_out],
        real=e.data,
        synthetic=e.synthetic,
        per_cell=e.settings.report_cells,
    )
