"""An experiment's settings as its stages need them: folders, models, and the settings that each command is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latent_medi.autoencoder.settings import AutoencoderSettings
from latent_medi.core import config
from latent_medi.core.errors import UserError
from latent_medi.evaluation.settings import EvaluateSettings
from latent_medi.experiment.launching import Launching
from latent_medi.experiment.models import (
    Model,
    concerning,
    data_folder,
    latents_folder,
    open_models,
    split_record,
    training_data,
    with_longer,
)
from latent_medi.experiment.nodes import Leader, run_launched
from latent_medi.experiment.settings import STAGES, ExperimentSettings
from latent_medi.experiment.stages import Stages
from latent_medi.image_classifier.settings import REAL, CompareClassifiersSettings
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.latents.settings import EncodeSettings
from latent_medi.metadata.schema import Schema
from latent_medi.selection.settings import SelectSettings
from latent_medi.shards.format.selections import SELECTED_PREFIX

COMPARISON = "image_classifiers"
"""Folder of the image classifiers and of their comparison."""
IMAGE_CLASSIFIER = "image_classifier"
"""As the encoder of a selection, the first classifier of real patches alone."""
_ENCODED_AT_ONCE = 16  # of 256 px, Stable Diffusion's autoencoder takes 2.5 GiB for them, 1.3 in bf16


class Experiment:
    """What the stages of one experiment share.

    Args:
        settings: The experiment.
        where: How its commands are started; by default one process for each.
        leader: Starts the same on other nodes, if there are any.

    Raises:
        UserError: Settings that cannot be followed, found without opening any data.
    """

    def __init__(
        self, settings: ExperimentSettings, where: Launching | None = None, leader: Leader | None = None
    ) -> None:
        if settings.stages != [name for name in STAGES if name in settings.stages]:
            raise UserError(
                f"stages is [{', '.join(settings.stages)}]; stages are listed once and in order.",
                f"The order is {', '.join(STAGES)}.",
            )
        if not settings.stages:
            raise UserError("stages is empty.", f"List stages, in this order: {', '.join(STAGES)}.")
        if not settings.data and settings.recipe != "demo" and not settings.source:
            raise UserError(
                f"The recipe {settings.recipe!r} needs the folder of its source.",
                f"latent-medi run --config {settings.recipe}/… source=/path/to/it",
            )
        self.where, self.leader = where or Launching(), leader
        if settings.parallel > 1 and self.where.processes > 1:
            raise UserError(
                f"parallel is {settings.parallel}, and each model takes {self.where.processes} processes.",
                "Leave parallel out, or set launch_processes=1.",
            )
        self.settings = settings
        self.recipe_arguments = _recipe_arguments(settings)
        self.folder = Path(settings.out)
        self.data = data_folder(settings)
        self.latents = latents_folder(settings)
        self.models = open_models(settings)
        self.to_train = [model for model in self.models.values() if model.training is not None]
        self.sampled = [model for model in self.models.values() if model.entry.sample]
        self.guided = [model for model in self.models.values() if model.entry.classifier and self.has("classifier")]
        unguided = [model.name for model in self.sampled if model.entry.classifier and model not in self.guided]
        if unguided and self.has("sample"):
            raise UserError(
                f"models.{unguided[0]} has a classifier, and stages does not list classifier.",
                "List it before plan, or remove the classifier.",
            )
        self._check_classifiers()
        self.synthetic = {model.name: self.folder / "synthetic" / model.name for model in self.sampled}
        self.encodings = self._encodings()
        self.evaluation = self._evaluation()
        self.stages = Stages(self.folder, settings.stages, concerning, with_longer)

    def has(self, stage: str) -> bool:
        """Whether the experiment has a stage."""
        return stage in self.settings.stages

    def needs(self, *stages: str) -> tuple[str, ...]:
        """Those of some stages that the experiment has."""
        return tuple(stage for stage in stages if self.has(stage))

    @property
    def has_data(self) -> bool:
        """Whether the dataset folder exists, complete."""
        return bool(self.settings.data) or (self.has("shards") and self.stages.finished("shards"))

    def check_stages(self) -> None:
        """Refuse to remove costly outputs: before anything runs, and again once a dataset or corpus is made that was
        absent or damaged, for what is made from it cannot be compared before.

        Raises:
            UserError: As :meth:`Stages.check`.
        """
        to_make = "" if self.has_data else "shards"
        if not to_make and self.has("corpus") and not self.stages.finished("corpus"):
            to_make = "corpus"
        if to_make:
            self.stages.check(STAGES[: STAGES.index(to_make) + 1])
        else:
            self.stages.check()

    @property
    def split_record(self) -> dict[str, Any]:
        """Record of the split: whoever splits the patients anew, or corrects their metadata, has another experiment."""
        name = self.settings.split
        record: dict[str, Any] = split_record(self.data, name) if self.has_data else {"name": name}
        return {"split": record | self.only}

    @property
    def only(self) -> dict[str, Any]:
        """The row filter as a setting of a command; nothing if there is none, as in records of earlier versions."""
        return {"only": self.settings.only} if self.settings.only else {}

    @property
    def held_out(self) -> list[dict[str, str]]:
        """The held-out combinations; those of the split that can be evaluated, if the settings leave it to the split.

        Needs the dataset folder.
        """
        if isinstance(self.settings.held_out, list):
            return self.settings.held_out
        from latent_medi.evaluation.cohort.open_study import open_study

        settings = replace(self.evaluation, synthetic={}, further_seeds={}, selected={}, candidate="", downstream=False)
        return open_study(settings).held_out

    def run_commands(self, commands: Mapping[str, Sequence[str]]) -> None:
        """Run ``latent-medi`` commands on all the processes that there are.

        Args:
            commands: Words after ``latent-medi`` by the name to show.
        """
        run_launched(commands, self.where, self.leader, self.settings.parallel)

    @property
    def autoencoder(self) -> str:
        """The autoencoder of the latents: the adapted one, if the experiment adapts it."""
        if self.has("autoencoder"):
            return str(self.folder / "autoencoder" / "autoencoder")
        return self.settings.autoencoder

    @property
    def selects_by_classifier(self) -> bool:
        """Whether patches are selected in the features of an image classifier that this experiment trains."""
        return bool(self.settings.select.get("encoder") == IMAGE_CLASSIFIER)

    def _check_classifiers(self) -> None:
        """Refuse stages and settings of image classifiers of which one is there without the other."""
        settings = self.settings
        stages = self.needs("real_classifier", "image_classifier")
        if stages and not settings.image_classifier:
            raise UserError(
                f"stages lists {stages[0]}, and image_classifier names no configuration.",
                "image_classifier: histodiffusion/vit",
            )
        if self.selects_by_classifier and self.has("select") and not self.has("real_classifier"):
            raise UserError(
                "select.encoder is image_classifier, and stages does not list real_classifier.",
                "List it before select.",
            )

    def comparison(self) -> CompareClassifiersSettings:
        """Settings of the image classifiers on real patches, and on these and each model's samples."""
        settings = self.settings
        values = config.load(CompareClassifiersSettings, Path(settings.image_classifier))
        if not self.has("select"):
            values = config.merge(values, {"choices": ["random"]})
        derived = {
            "data": str(self.data),
            "split": settings.split,
            "out": str(self.folder / COMPARISON),
            "synthetic": {name: str(folder) for name, folder in self.synthetic.items()},
            "selection": self.selection_name if self.has("select") else "",
            **self.only,
        }
        seed = {"seed": settings.seed}
        values = config.merge(config.merge(values | seed, settings.image_classifier_train), derived)
        return config.make(CompareClassifiersSettings, values, "image_classifier")

    def adaptation(self) -> AutoencoderSettings:
        """Settings of the autoencoder's adaptation to the training patches."""
        settings = self.settings
        derived = {
            "data": str(self.data),
            "split": settings.split,
            "out": str(self.folder / "autoencoder"),
            "init": settings.autoencoder,
            **self.only,
        }
        values = config.merge({"seed": settings.seed} | settings.autoencoder_train, derived)
        return config.make(AutoencoderSettings, values, "autoencoder_train")

    def _encodings(self) -> dict[str, EncodeSettings]:
        """Encoding settings by the first model of a dataset of its own; "" is the experiment's dataset."""
        folders = {self.latents: ("", str(self.data))}
        for model in self.to_train:
            if model.entry.data:
                data, _ = training_data(self.settings, model.entry)
                folders.setdefault(latents_folder(self.settings, model.name), (model.name, data))
        found = {}
        first: dict[str, Any] = {"device_batch": _ENCODED_AT_ONCE}
        if self.has("evaluate"):  # its encoder is at hand and fits the tissue
            encoder = self.settings.encoders[0]
            weights = self.settings.weights.get(encoder, "")
            first["reconstruction_error"] = {"encoder": encoder, "weights": weights}
        for latents, (name, data) in folders.items():
            derived = {"data": data, "out": latents, "autoencoder": self.autoencoder}
            if not name:
                derived |= self.only
            values = config.merge(config.merge(first, self.settings.encode), derived)
            found[name] = config.make(EncodeSettings, values, "encode")
            found[name].check()
        return found

    def _evaluation(self) -> EvaluateSettings:
        settings = self.settings
        derived = {
            "real": str(self.data),
            "synthetic": {name: str(folder) for name, folder in self.synthetic.items()},
            "out": str(self.folder),
            "held_out": settings.held_out,
            "split": settings.split,
            "encoders": settings.encoders,
            "weights": settings.weights,
            "site_field": settings.site_field,
            "seed": settings.seed,
            **self.only,
        }
        tasks = settings.plan.get("tasks")
        if tasks and "tasks" not in settings.evaluate.get("medi_protocol", {}):
            derived["medi_protocol"] = {"tasks": tasks}
        # HistoDiffusion's protocol compares selected with random patches itself.
        if self.has("select") and settings.evaluate.get("downstream_protocol") != "histodiffusion":
            derived["selected"] = dict.fromkeys(self.synthetic, SELECTED_PREFIX + self.selection_name)
        return config.make(EvaluateSettings, config.merge(derived, settings.evaluate), "evaluate")

    @property
    def selection_name(self) -> str:
        """Name of the selection that the stage "select" makes."""
        return self.settings.select.get("name", SelectSettings.name)

    def selection(self, name: str) -> SelectSettings:
        """Settings of the selection among one model's samples."""
        settings = self.settings
        derived = {
            "data": str(self.synthetic[name]),
            "real": str(self.data),
            "split": settings.split,
            "encoder": settings.encoders[0],
            "weights": settings.weights.get(settings.encoders[0], ""),
            "cache": str(self.folder / "features"),
            "seed": settings.seed,
            "replace": True,  # its record says whether it is the one that these settings make
            **self.only,
        }
        made = config.make(SelectSettings, config.merge(derived, settings.select), "select")
        if not self.selects_by_classifier:
            return made
        comparison = self.comparison()
        folder = Path(comparison.out) / REAL / f"seed{comparison.seed}" / "model"
        return replace(made, encoder=str(folder), weights="")

    def classifier(self, model: Model) -> ClassifierSettings:
        """Settings of the latent classifier that guides a model's samples."""
        values = config.load(ClassifierSettings, Path(model.entry.classifier))
        derived = {
            "data": str(self.data),
            "latents": self.latents,
            "model": model.folder,
            "split": self.settings.split,
            "out": str(self.folder / "classifiers" / model.name),
            "seed": self.settings.seed,
            **self.only,
        }
        values = config.merge(config.merge(values, model.entry.classifier_train), derived)
        return config.make(ClassifierSettings, values, f"models.{model.name}.classifier")

    def conditions(self, model: Model, schema: Schema) -> list[str] | None:
        """Fields whose values a sample of a model must show: those that the model is conditioned on, and that of its
        guiding classifier; ``None`` means every field.

        Args:
            model: The model.
            schema: The fields of the experiment's dataset.
        """
        if model.fields is None:
            return None
        own = schema.named(model.fields)
        if model not in self.guided:
            return own
        field = self.classifier(model).field or (schema.class_field.name if schema.class_field else "")
        return [*own, *([field] if field not in own else [])]

    def plans(self, name: str) -> list[Path]:
        """The plan of a model's samples, then the longer ones of the rounds in which more were generated."""
        found = [self.folder / f"plan-{name}.csv"]
        for number in range(2, self.settings.select_rounds + 1):
            longer = self.folder / f"plan-{name}-round-{number}.csv"
            # One that does not begin with the plan before it is of an earlier plan.
            there = longer.is_file() and found[-1].is_file()
            if not there or not longer.read_bytes().startswith(found[-1].read_bytes()):
                break
            found.append(longer)
        return found

    def generation(self, model: Model) -> dict[str, Any]:
        """Sampling settings of a model (a partial)."""
        values = config.merge(config.as_dict(self.settings.generate), model.entry.generate)
        guidance, fields = values["guidance"], model.fields
        if fields is not None:  # scales are given for all models, some of which are conditioned on fewer fields
            scales = {name: scale for name, scale in guidance["scales"].items() if name in fields}
            guidance = {**guidance, "scales": scales, "order": [name for name in guidance["order"] if name in fields]}
        if model in self.guided:
            values = config.merge(values, {"classifier": {"model": f"{self.classifier(model).out}/classifier"}})
        return {
            **values,
            "guidance": guidance,
            "model": model.folder,
            "adapters": [str(model.adapter)] if model.adapter else values["adapters"],
            "plan": str(self.plans(model.name)[-1]),
            "out": str(self.synthetic[model.name]),
        }


def _recipe_arguments(settings: ExperimentSettings) -> dict[str, Any]:
    """What the recipe's ``build`` is given besides the folders, the patch size, the seed and the processes."""
    tables = {"metadata": settings.metadata, "codes": settings.codes}
    given = settings.recipe_options | {name: path for name, path in tables.items() if path}
    if not given:
        return {}
    if settings.data:
        raise UserError(
            f"{', '.join(given)} and data are given; options are of a recipe, and data is a dataset folder.",
            "Leave data out to have the recipe make one.",
        )
    if settings.recipe == "demo":
        raise UserError(f"The recipe 'demo' takes no {next(iter(given))}.", "Name a recipe: recipe=tcga-ut.")
    if twice := [name for name, path in tables.items() if path and name in settings.recipe_options]:
        raise UserError(f"{twice[0]} is given twice, also in recipe_options.", "Give one of them.")
    from latent_medi.recipes.registry import recipe_arguments

    return recipe_arguments(settings.recipe, given)
