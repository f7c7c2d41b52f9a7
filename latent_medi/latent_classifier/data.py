"""The data of a latent classifier: the model to guide, training and validation rows, the field and its values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.latent_classifier.scores import Validation
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.latents.networks import latents_fit
from latent_medi.latents.store import LatentStore
from latent_medi.metadata.schema import UNKNOWN_WORD, Field
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.metadata.training_record import training_record
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.reading.remote import open_dataset
from latent_medi.training.data import (
    TrainingData,
    combination_weights,
    open_latents,
    refuse_null,
    stream_latents,
    training_rows,
)
from latent_medi.training.finetune.transfer import Source, open_source

logger = get_logger("training")


def open_model(folder: str) -> Source:
    """The model to guide, whose latents and noise schedule the classifier uses.

    Raises:
        UserError: It is not a complete model of this program.
    """
    source = open_source(folder)
    if source.scheduler is None or source.autoencoder is None:
        raise UserError(
            f"{folder} does not record the autoencoder, whitening and noise schedule of its training.",
            "Give a model that `latent-medi train` wrote, or leave model empty and set objective.",
        )
    return source


def open_parts(
    settings: ClassifierSettings, source: Source | None, device: torch.device
) -> tuple[TrainingData, Validation, Field, tuple[str, ...]]:
    """Training rows, validation rows, the field, and its values in the order of the logits.

    Raises:
        UserError: Data, split, field or value are absent; a patient is in both parts; or the latents are not those of
            the model.
    """
    dataset = open_dataset(settings.data)
    field = chosen_field(dataset, settings.field)
    values = chosen_values(field, settings.values)
    rows = training_rows(dataset, settings.split, settings.split_value, settings.only)
    rows = labelled(dataset, field, values, rows)
    store = (
        open_latents(dataset, settings.latents, settings.resident, device, rows)
        if settings.latents
        else stream_latents(dataset, settings.autoencoder, settings.stream, device)
    )
    if store.shape[1] != store.shape[2]:
        raise UserError(f"Latents are square; these are {store.shape[1]}×{store.shape[2]}.")
    encoded_by = store.info["autoencoder"]["hash"]
    if source is not None and source.autoencoder is not None and not latents_fit(source.autoencoder, encoded_by):
        raise UserError(
            f"The latents were encoded by the autoencoder {encoded_by[:12]}, and {settings.model} was trained on those "
            f"of {source.autoencoder['hash'][:12]}.",
            "Encode the data with the model's autoencoder.",
        )
    table = dataset.index.iloc[rows]
    present = set(table[field.name])
    if empty := [value for value in values if value not in present]:
        raise UserError(
            f"No training patch has {field.name} {', '.join(map(repr, empty))}, so it cannot be learned.",
            "List the other values in the setting values.",
        )
    schema = dataset.schema.subset([field.name])
    balance = [field.name] if settings.balance is None else settings.balance
    weights = combination_weights(dataset, rows, balance, settings.balance_temperature)
    info = {"name": dataset.name, "patch_size": dataset.patch_size, "mpp": dataset.info["mpp"]}
    info |= {"training_patients": int(table["patient"].nunique()), "seen": training_record(table, dataset.schema)}
    conditions = Conditions.from_schema(schema, table[[field.name]])
    data = TrainingData(store, rows, table["key"].to_numpy(), schema, conditions, weights, info)

    others = np.zeros(0, np.int64)
    if settings.split and settings.validation_value:
        assert_patient_disjoint(dataset.index, f"{SPLIT_PREFIX}{settings.split}")
        others = training_rows(dataset, settings.split, settings.validation_value, settings.only)
        others = labelled(dataset, field, values, others)
        if isinstance(store, LatentStore):
            store.check_held(others)
    table = dataset.index.iloc[others]
    labels = torch.tensor([values.index(str(value)) for value in table[field.name]], dtype=torch.long)
    patients = int(table["patient"].nunique())
    validation = Validation(store, others, table["key"].to_numpy(), labels, patients, len(values))
    return data, validation, field, values


def chosen_field(dataset: PatchDataset, name: str) -> Field:
    """The field to classify.

    Raises:
        UserError: There is no such field (names the closest), no class, or it is continuous.
    """
    field = dataset.schema.field(name) if name else dataset.schema.class_field
    if field is None:
        raise UserError(f"{dataset.folder} has no class.", f"Set field to one of {', '.join(dataset.schema.names)}.")
    if field.continuous:
        raise UserError(f"The field {field.name!r} is a number; a classifier needs a field with a vocabulary.")
    return field


def chosen_values(field: Field, names: Sequence[str]) -> tuple[str, ...]:
    """The classes: values of the field, in the order of its vocabulary.

    Raises:
        UserError: The field does not have a value (names the closest), or there are fewer than two.
    """
    for name in names:
        field.code(name)
    values = tuple(value for value in field.values if not names or value in names)
    if len(values) < 2:
        raise UserError(
            f"There are {len(values)} values of {field.name} to classify ({', '.join(values) or 'none'}); a classifier "
            "needs two or more."
        )
    return values


def labelled(dataset: PatchDataset, field: Field, values: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """The rows whose value of a field is one of ``values``.

    Raises:
        UserError: A row has no value, not even "unknown".
    """
    refuse_null(dataset, field.name, rows)
    column = dataset.index[field.name].iloc[rows].astype(str)
    kept = rows[column.isin(values).to_numpy()]
    if len(kept) < len(rows):
        others = f"{UNKNOWN_WORD} or another" if len(values) < len(field.values) else UNKNOWN_WORD
        missing = f"{len(rows) - len(kept):,} of {len(rows):,}"
        logger.info("%s patches are left out: their %s is %s.", missing, field.name, others)
    return kept
