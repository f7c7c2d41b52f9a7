"""Stages on image classifiers: of real patches alone, and of real and synthetic ones, which are compared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from latent_medi.core import config
from latent_medi.experiment.damaged_outputs import damaged_model
from latent_medi.experiment.experiment import COMPARISON, Experiment
from latent_medi.experiment.stages import Stage
from latent_medi.image_classifier.comparison import RESULT_FILE, TABLE_FILE
from latent_medi.image_classifier.settings import REAL, CompareClassifiersSettings

_SWEEP = ("percents", "choices", "seeds")


def real_classifier(e: Experiment) -> Stage:
    """Classifiers of the labelled patches alone, one per seed: those that the others are compared with. The first one's
    features may serve the selection."""
    settings = e.comparison()
    own = replace(settings, synthetic={}, selection="")
    # More seeds are added to those that there are.
    inputs = e.split_record | {"classifier": _training(settings), "models": {"seeds": settings.seeds}}
    first = e.folder / COMPARISON / REAL / f"seed{settings.seed}" / "model"
    return Stage(
        lambda: _run(e, "real_classifier", own),
        inputs,
        ("shards",),
        by_model={REAL: (f"{COMPARISON}/{REAL}",)},
        damaged=lambda: damaged_model(first),
        costly=True,
    )


def image_classifier(e: Experiment) -> Stage:
    """Classifiers of real and synthetic patches, and their comparison with those of real ones alone."""
    settings = e.comparison()
    sweep = {name: getattr(settings, name) for name in _SWEEP}
    # Of no model: what trainings there are. A changed list keeps those that it still has.
    inputs = {"models": {"table": sweep | {"sets": list(settings.synthetic), "selection": settings.selection}}}
    tables = [e.folder / COMPARISON / name for name in (RESULT_FILE, TABLE_FILE)]
    return Stage(
        lambda: _run(e, "image_classifier", settings),
        inputs,
        ("real_classifier", *(e.needs("select") or ("sample",))),
        by_model={name: (f"{COMPARISON}/{name}",) for name in settings.synthetic},
        damaged=lambda: [path for path in tables if not path.is_file()],
        costly=True,
    )


def _training(settings: CompareClassifiersSettings) -> dict[str, Any]:
    """What a training depends on besides its patches."""
    from latent_medi.image_classifier.train import FREE

    free = FREE | {*_SWEEP, "selection", "percent", "choice"}
    return {key: value for key, value in config.as_dict(settings).items() if key not in free}


def _run(e: Experiment, job: str, settings: CompareClassifiersSettings) -> None:
    file = e.folder / f"{job}.yaml"
    config.save_settings(settings, file)
    e.run_commands({job: ["compare-classifiers", "--config", str(file)]})
