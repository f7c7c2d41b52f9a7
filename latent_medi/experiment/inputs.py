"""What an experiment's stages are given: settings and inputs, derived from the experiment's own."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latent_medi.core import config
from latent_medi.core.errors import UserError, nearest
from latent_medi.experiment.settings import ExperimentSettings
from latent_medi.latents.settings import EncodeSettings
from latent_medi.training.settings import TrainSettings

if TYPE_CHECKING:
    from latent_medi.training.finetune.transfer import Source

ARMS = ("medi", "cls")
"""MeDi knows class and metadata, CLS the class alone; all else is equal."""

_ENCODED_AT_ONCE = 16  # of 256 px, Stable Diffusion's autoencoder takes 2.5 GiB for them, 1.3 in bf16


def data_folder(settings: ExperimentSettings, folder: Path) -> Path:
    return Path(settings.data) if settings.data else folder / "data"


def train_settings(settings: ExperimentSettings, arm: str, folder: Path) -> dict[str, Any]:
    values = config.load(TrainSettings, Path(settings.medi if arm == "medi" else settings.cls))
    return config.merge(
        config.merge(values, settings.train),
        {
            "data": str(data_folder(settings, folder)),
            "latents": settings.latents or str(folder / "latents"),
            "split": settings.split,
            "out": str(folder / arm),
            "seed": settings.seed,
        },
    )


def encode_settings(settings: ExperimentSettings, folder: Path) -> EncodeSettings:
    derived = {
        "data": str(data_folder(settings, folder)),
        "out": settings.latents or str(folder / "latents"),
        "autoencoder": settings.autoencoder,
    }
    values = config.merge(config.merge({"device_batch": _ENCODED_AT_ONCE}, settings.encode), derived)
    chosen = config.make(EncodeSettings, values, "encode")
    chosen.check()
    return chosen


def latents_of(encoding: EncodeSettings) -> dict[str, Any]:
    """What latents depend on; settings that earlier versions did not have are left out where they are as they were."""
    decisive = {field.name: field.default for field in fields(EncodeSettings) if field.name in ("precision", "views")}
    chosen = {name: getattr(encoding, name) for name in decisive}
    return {"autoencoder": encoding.autoencoder} | {n: v for n, v in chosen.items() if v != decisive[n]}


def split_of(data: Path, name: str) -> dict[str, str]:
    """Hash of a split's column and of the metadata; no more than its name if there is no such split."""
    import pandas as pd

    from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
    from latent_medi.shards.format.selections import column_hash

    dataset = PatchDataset.open(data)
    columns = ["patient", *dataset.schema.names, *([SPLIT_PREFIX + name] if name in dataset.splits else [])]
    return {"name": name, "sha256": column_hash(pd.Series([column_hash(dataset.index[c]) for c in columns]))}


def has_numbers(data: Path) -> bool:
    """Whether a dataset has a continuous field."""
    from latent_medi.shards.dataset import PatchDataset

    return any(field.continuous for field in PatchDataset.open(data).schema.fields)


def given_model(settings: ExperimentSettings, arm: str) -> Source:
    """A model that is trained already, looked at before anything is run."""
    from latent_medi.metadata.training_record import was_trained_on
    from latent_medi.training.finetune.transfer import open_source

    if arm not in ARMS:
        raise UserError(f"models names the arm {arm!r}; {nearest(arm, ARMS)}.")
    path = Path(settings.models[arm])
    for kept in ARMS:
        own = Path(settings.out) / kept
        if not path.resolve().is_relative_to(own.resolve()):
            continue
        raise UserError(
            f"The model {path} lies in {own}, where this experiment keeps the {kept} that it trains.",
            "Copy it to a folder of its own, or leave models out: what is trained is kept.",
        )
    model = open_source(path)
    if model.scheduler is None or model.autoencoder is None:
        raise UserError(f"{path} is no whole model of this program.", "Name the folder `model` of a finished run.")
    for combination in settings.held_out if settings.evaluate.get("unseen", True) else []:
        if was_trained_on(model.seen, combination):
            raise UserError(
                f"The model {path} ({arm}) was trained on patches of {' × '.join(combination.values())}.",
                "Train one without them, or name combinations that it did not see.",
            )
    return model
