"""Stages on the models: the autoencoder's adaptation, training, the classifiers that guide them, and their samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from latent_medi.core import config
from latent_medi.core.files import remove
from latent_medi.experiment.damaged_outputs import damaged_dataset, damaged_model, reopen
from latent_medi.experiment.experiment import Experiment
from latent_medi.experiment.models import Model
from latent_medi.experiment.stages import Stage
from latent_medi.sampling.settings import GenerateSettings
from latent_medi.training.settings import TrainSettings


def autoencoder(e: Experiment) -> Stage:
    """The autoencoder, adapted to the training patches, in ``autoencoder``."""
    from latent_medi.autoencoder.train import FREE, PRODUCT

    chosen = e.adaptation()
    inputs = {key: value for key, value in config.as_dict(chosen).items() if key not in FREE}
    if chosen.init:
        del inputs["network"]
    return Stage(
        lambda: _adapt(e),
        e.split_record | {"adaptation": inputs, "autoencoder": chosen.init},
        ("shards",),
        ("autoencoder",),
        damaged=lambda: damaged_model(e.folder / "autoencoder" / PRODUCT),
        costly=True,
    )


def _adapt(e: Experiment) -> None:
    file = e.folder / "autoencoder.yaml"
    config.save_settings(e.adaptation(), file)
    e.run_commands({"autoencoder": ["autoencoder", "--config", str(file)]})


def train(e: Experiment) -> Stage:
    """The models that are not trained already, each in its folder."""
    inputs = {model.name: model.record() for model in e.to_train}
    if given := _given(e):
        inputs["models"] = given
    return Stage(
        lambda: _train(e),
        inputs | e.split_record,
        ("encode",),
        by_model={model.name: (model.name,) for model in e.to_train},
        damaged=lambda: [path for m in e.to_train for path in damaged_model(m.adapter or m.out / "model")],
        costly=True,
        prolongs=True,
    )


def _given(e: Experiment) -> dict[str, Any]:
    """Hashes of the models that were trained elsewhere."""
    return {model.name: model.record() for model in e.models.values() if model.source is not None}


def _train(e: Experiment) -> None:
    """Models that start from others are trained after them, all others at the same time."""
    waiting = list(e.to_train)
    while waiting:
        ready = [model for model in waiting if model.parent not in waiting]
        commands = {}
        for model in ready:
            file = e.folder / f"train-{model.name}.yaml"
            config.save_partial(TrainSettings, model.training or {}, file)
            commands[model.name] = ["train", "--config", str(file)]
        e.run_commands(commands)
        waiting = [model for model in waiting if model not in ready]


def classifier(e: Experiment) -> Stage:
    """A classifier of noisy latents for each model whose samples one guides, in ``classifiers/NAME``."""
    from latent_medi.latent_classifier.train import FREE

    chosen = {model.name: e.classifier(model) for model in e.guided}
    earlier: dict[str, Any] = {"only": {}, "noise_aware": True}  # what earlier versions could not choose
    inputs = {
        name: {k: v for k, v in config.as_dict(settings).items() if k not in FREE and earlier.get(k, ...) != v}
        for name, settings in chosen.items()
    }
    return Stage(
        lambda: _train_classifiers(e),
        e.split_record | {"models": inputs},
        e.needs("train") or ("encode",),
        by_model={name: (f"classifiers/{name}",) for name in chosen},
        damaged=lambda: [p for name in chosen for p in damaged_model(e.folder / "classifiers" / name / "classifier")],
        costly=True,
        prolongs=True,
    )


def _train_classifiers(e: Experiment) -> None:
    commands = {}
    for model in e.guided:
        file = e.folder / f"classifier-{model.name}.yaml"
        config.save_settings(e.classifier(model), file)
        commands[model.name] = ["classifier", "--config", str(file)]
    e.run_commands(commands)


def sample(e: Experiment) -> Stage:
    """The patches of each model's plan, as the dataset folder ``synthetic/NAME``."""
    free = {"plan", "model", "out", "grid", "device_batch"}
    inputs = {key: value for key, value in config.as_dict(e.settings.generate).items() if key not in free}
    own = {model.name: model.entry.generate for model in e.sampled if model.entry.generate}
    if models := own | ({} if e.has("train") else _given(e)):
        inputs["models"] = models
    trained = ("train",) if e.to_train else e.needs("train")
    return Stage(
        lambda: _sample(e),
        inputs,
        (*trained, *e.needs("classifier"), "plan"),
        by_model={name: (f"synthetic/{name}",) for name in e.synthetic},
        damaged=lambda: [path for folder in e.synthetic.values() for path in damaged_dataset(folder)],
        mend=lambda: reopen(*e.synthetic.values()),
        costly=True,
    )


def _sample(e: Experiment) -> None:
    """Samples that are not there yet begin with the plan, whatever a selection asked for of earlier ones."""
    for model in e.sampled:
        if not e.synthetic[model.name].exists():
            for longer in e.plans(model.name)[1:]:
                remove(longer)
    sample_models(e, e.sampled)


def sample_models(e: Experiment, models: Sequence[Model]) -> None:
    """Generate the samples of some models, each by its newest plan; what exists of a shorter plan is continued."""
    commands = {}
    for model in models:
        file = e.folder / f"sample-{model.name}.yaml"
        config.save_partial(GenerateSettings, e.generation(model), file)
        commands[model.name] = ["sample", "--config", str(file)]
    e.run_commands(commands)
