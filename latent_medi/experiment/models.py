"""The named models of an experiment: how each is trained or where it is, what it starts from, what it knows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_medi.core import config
from latent_medi.core.errors import UserError, nearest
from latent_medi.experiment.settings import ExperimentModel, ExperimentSettings
from latent_medi.training.settings import TrainSettings

if TYPE_CHECKING:
    from latent_medi.training.finetune.transfer import Source

CORPUS = "corpus"
"""As a model's dataset, the joined sources of unlabelled tissue; also their folder, and its split."""
DATASET_FILE = "dataset.json"
_OTHER_FOLDERS = {"classifiers", "corpus", "corpora", "data", "features", "reference", "stages", "synthetic"}
_OTHER_FOLDERS |= {"autoencoder", "image_classifiers", "real", "seeds", "table"}  # three are words of records
_RECORD_KEYS = {"models", "split"}


@dataclass(frozen=True, eq=False)
class Model:
    """One model of an experiment.

    Args:
        name: Its name.
        entry: Its settings.
        out: Folder of its training run.
        folder: Its model folder, which training may yet have to make; of an adapter, that of the model it changes.
        training: Its training settings (a partial); ``None`` for a model that is trained already.
        source: The model that is trained already; ``None`` for one to train.
        parent: The model of the experiment that its training starts from, or ``None``.
    """

    name: str
    entry: ExperimentModel
    out: Path
    folder: str
    training: dict[str, Any] | None = None
    source: Source | None = None
    parent: Model | None = None

    @property
    def adapter(self) -> Path | None:
        """Folder of the low-rank adapter that its training makes; ``None`` for a whole model."""
        return self.out / "adapter" if self.training and self.training.get("lora") else None

    @property
    def fields(self) -> list[str] | None:
        """Fields that it is conditioned on; ``None`` means every field of its dataset."""
        if self.source is not None:
            return [] if self.source.conditioner is None else list(self.source.conditioner.schema.names)
        own = (self.training or {}).get("model", {}).get("fields")
        inherited = self.parent.fields if self.parent else []
        return None if own is None or inherited is None else list(dict.fromkeys([*inherited, *own]))

    def record(self) -> Any:
        """What it depends on besides the latents: a trained model's hash, else settings without paths and speed."""
        from latent_medi.training.run_folder import FREE

        if self.source is not None:
            return self.source.model_hash
        free = FREE - {"init_from", "autoencoder", "stream"}
        kept_from = self.training or {}
        kept = {key: value for key, value in kept_from.items() if key not in free}
        if self.entry.data:
            data, split = Path(kept_from["data"]), kept_from["split"]
            # A corpus that is not made yet has no record.
            kept["data"] = split_record(data, split) if (data / DATASET_FILE).is_file() else {"name": split}
        return kept | ({"init_from": self.parent.record()} if self.parent else {})


def open_models(settings: ExperimentSettings) -> dict[str, Model]:
    """The models by name, each after the one that it starts from.

    Raises:
        UserError: A name that no model can have, a model without configuration, an unknown or circular ``init_from``,
            or a trained model that cannot be used.
    """
    _check_corpus(settings)
    for name, entry in settings.models.items():
        _check(name, entry)
    found: dict[str, Model] = {}
    for name in _order(settings.models):
        entry = settings.models[name]
        parent = found[entry.init_from] if entry.init_from else None
        found[name] = _trained(settings, name, entry) if entry.folder else _to_train(settings, name, entry, parent)
    if not any(model.entry.sample for model in found.values()):
        raise UserError("No model of the experiment is sampled.", "Name models, and leave sample=true for one.")
    return found


def _check(name: str, entry: ExperimentModel) -> None:
    taken = name in _OTHER_FOLDERS | _RECORD_KEYS or name.startswith("latents")
    if taken or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(
            f"No model of an experiment can be called {name!r}.",
            "The experiment uses that name itself." if taken else "Use letters, digits, - and _.",
        )
    if not entry.folder and not entry.config:
        raise UserError(
            f"models.{name} has neither config nor folder.",
            "Give config for a model to train, or folder for one that is trained already.",
        )
    if not entry.data and (entry.latents or entry.split):
        key = "latents" if entry.latents else "split"
        raise UserError(f"models.{name}.{key} goes with models.{name}.data, which is empty.")
    if entry.classifier_train and not entry.classifier:
        raise UserError(f"models.{name}.classifier_train goes with models.{name}.classifier, which is empty.")


def _check_corpus(settings: ExperimentSettings) -> None:
    """Refuse a corpus that nothing makes, or of which a source is given twice or not at all."""
    users = [name for name, entry in settings.models.items() if entry.data == CORPUS]
    if users and "corpus" not in settings.stages:
        raise UserError(f"models.{users[0]}.data is corpus, and stages does not list corpus.", "List it after shards.")
    if "corpus" in settings.stages and not settings.corpus:
        raise UserError("stages lists corpus, and corpus names no source.", "corpus: {own: {data: /path/to/dataset}}")
    if len(parts := [name for name, source in settings.corpus.items() if source.part]) > 1:
        raise UserError(f"corpus.{parts[0]} and corpus.{parts[1]} are both parts of the split.", "Give one part.")
    for name, source in settings.corpus.items():
        given = [key for key in ("data", "recipe", "part") if getattr(source, key)]
        if len(given) != 1:
            raise UserError(
                f"corpus.{name} has {' and '.join(given) or 'neither data nor recipe nor part'}.", "Give one of them."
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise UserError(f"No source of a corpus can be called {name!r}.", "Use letters, digits, - and _.")


def training_data(settings: ExperimentSettings, entry: ExperimentModel) -> tuple[str, str]:
    """Dataset folder and split that a model is trained on."""
    if entry.data == CORPUS:
        return str(Path(settings.out) / CORPUS), CORPUS
    return (entry.data, entry.split) if entry.data else (str(data_folder(settings)), settings.split)


def _order(entries: Mapping[str, ExperimentModel]) -> list[str]:
    """Names such that a model comes after the one that it starts from; otherwise as they are given."""
    order: list[str] = []

    def add(name: str, children: list[str]) -> None:
        if name in children:
            raise UserError(f"init_from of the models goes round in a circle: {' → '.join([*children, name])}.")
        parent = entries[name].init_from
        if parent and parent not in entries:
            raise UserError(
                f"models.{name}.init_from is {parent!r}, no model of the experiment; {nearest(parent, entries)}.",
                f"A model folder elsewhere is given as models.{name}.train.init_from.",
            )
        if parent:
            add(parent, [*children, name])
        if name not in order:
            order.append(name)

    for name in entries:
        add(name, [])
    return order


def _to_train(settings: ExperimentSettings, name: str, entry: ExperimentModel, parent: Model | None) -> Model:
    out = Path(settings.out) / name
    values = config.load(TrainSettings, Path(entry.config))
    for over in (settings.train, entry.train):
        values = config.merge(values, over)
    data, split = training_data(settings, entry)
    values |= {"data": data, "split": split, "latents": latents_folder(settings, name)}
    values |= {"out": str(out), "seed": settings.seed}
    if entry.data == CORPUS and any(source.share for source in settings.corpus.values()):
        values["mixture"] = {name: source.share for name, source in settings.corpus.items()}
    if settings.only and not entry.data:
        values["only"] = settings.only
    if parent is not None:
        if values.get("init_from"):
            raise UserError(
                f"models.{name} has init_from={entry.init_from} and train.init_from={values['init_from']}.",
                "Give one of them.",
            )
        if parent.adapter:
            raise UserError(
                f"models.{name} starts from {parent.name}, which trains an adapter and no whole model.",
                f"Start it from {parent.name}'s own init_from.",
            )
        values["init_from"] = parent.folder
    folder = values["init_from"] if values.get("lora") and values.get("init_from") else str(out / "model")
    return Model(name, entry, out, folder, training=values, parent=parent)


def _trained(settings: ExperimentSettings, name: str, entry: ExperimentModel) -> Model:
    """A model that is trained already, opened before anything is run."""
    from latent_medi.training.finetune.transfer import open_source

    path = Path(entry.folder)
    for other in settings.models:
        own = Path(settings.out) / other
        if path.resolve().is_relative_to(own.resolve()):
            raise UserError(
                f"The folder of models.{name}, {path}, is inside {own}, where this experiment trains {other}.",
                "Copy it to a folder of its own; or give config: a model that is trained is kept.",
            )
    source = open_source(path)
    if source.scheduler is None or source.autoencoder is None:
        raise UserError(f"{path} is no whole model of this program.", "Give the folder `model` of a finished run.")
    model = Model(name, entry, Path(settings.out) / name, str(path), source=source)
    if isinstance(settings.held_out, list) and settings.evaluate.get("unseen", True):
        refuse_trained_on(model, settings.held_out)  # those of the split are known once the data are open
    return model


def refuse_trained_on(model: Model, held_out: Sequence[Mapping[str, str]]) -> None:
    """Refuse a model that is trained already, on patches of a held-out combination.

    Raises:
        UserError: Names the combination.
    """
    from latent_medi.metadata.training_record import was_trained_on

    for combination in held_out:
        if model.source is not None and was_trained_on(model.source.seen, combination):
            raise UserError(
                f"The model {model.folder} ({model.name}) was trained on patches of "
                f"{' × '.join(combination.values())}.",
                "Train one without them, or hold out combinations that it did not see.",
            )


def data_folder(settings: ExperimentSettings) -> Path:
    """The experiment's dataset folder."""
    return Path(settings.data or Path(settings.out) / "data")


def latents_folder(settings: ExperimentSettings, name: str = "") -> str:
    """Latent folder that a model is trained on, or of the experiment's dataset."""
    entry = settings.models[name] if name else ExperimentModel()
    if not entry.data:
        return settings.latents or str(Path(settings.out) / "latents")
    # Models with the same dataset share one folder, named after the first of them.
    first = next(other for other, one in settings.models.items() if one.data == entry.data)
    return entry.latents or str(Path(settings.out) / f"latents-{first}")


def split_record(data: Path, name: str) -> dict[str, str]:
    """Name of a split, and hash of its column and of the metadata; without the column if there is no such split."""
    import pandas as pd

    from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
    from latent_medi.shards.format.selections import column_hash

    dataset = PatchDataset.open(data)
    columns = ["patient", *dataset.schema.names, *([SPLIT_PREFIX + name] if name in dataset.splits else [])]
    return {"name": name, "sha256": column_hash(pd.Series([column_hash(dataset.index[c]) for c in columns]))}


def concerning(made_from: Mapping[str, Any], model: str) -> dict[str, Any]:
    """The part of a record that one model's outputs depend on; with "" what those depend on that belong to no model.

    A stage's inputs have models under ``models``; earlier versions wrote those of the stage "train" next to ``split``.
    """
    found: dict[str, Any] = {}
    for stage, inputs in made_from.items():
        if not isinstance(inputs, Mapping):
            found[stage] = inputs
            continue
        kept = {k: v for k, v in inputs.items() if k != "models" and (stage != "train" or k in ("split", model))}
        if model in inputs.get("models", {}):
            kept["models"] = {model: inputs["models"][model]}
        found[stage] = kept
    return found


def with_longer(made_from: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """A record in which each training run, of a model or classifier, that is longer now has its present length.

    Args:
        made_from: The record of a stage that is finished or was begun.
        now: The inputs that the stage has now.
    """
    found = dict(made_from)
    for stage in ("train", "classifier"):
        before, after = found.get(stage), now.get(stage)
        if not isinstance(before, Mapping) or not isinstance(after, Mapping):
            continue
        if stage == "train":
            found[stage] = {name: _lengthened(run, after.get(name)) for name, run in before.items()}
        else:
            runs = after.get("models", {})
            models = {name: _lengthened(run, runs.get(name)) for name, run in before.get("models", {}).items()}
            found[stage] = {**before, "models": models}
    return found


def _lengthened(before: Any, after: Any) -> Any:
    """The settings of a run with the length that it has now, if that is longer."""
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return before
    lengths = ("max_images", "max_steps")
    known = all(set(lengths) & set(run) for run in (before, after))
    if not known or _images(before) > _images(after):
        return before
    kept = {name: value for name, value in before.items() if name not in lengths}
    return kept | {name: after[name] for name in lengths if name in after}


def _images(run: Mapping[str, Any]) -> int:
    """Length of a run in images; with ``max_steps`` of whole batches."""
    from latent_medi.training.prolonged import planned_images

    given = {name: run.get(name, getattr(TrainSettings, name)) for name in ("max_images", "max_steps", "global_batch")}
    return planned_images({"settings": given})
