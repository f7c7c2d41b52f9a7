"""What a latent classifier learns from: the model whose latents it is to judge, rows to train and to measure on, the
field and its values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from latent_medi.core.errors import UserError
from latent_medi.core.progress import get_logger
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.latent_classifier.scores import Validation
from latent_medi.latent_classifier.settings import ClassifierSettings
from latent_medi.metadata.schema import UNKNOWN_WORD, Field
from latent_medi.metadata.splits import assert_patient_disjoint
from latent_medi.metadata.training_record import training_record
from latent_medi.shards.dataset import SPLIT_PREFIX, PatchDataset
from latent_medi.shards.reading.remote import open_dataset
from latent_medi.training.data import (
    TrainingData,
    cell_weights,
    open_latents,
    refuse_null,
    stream_latents,
    training_rows,
)
from latent_medi.training.finetune.transfer import Source, open_source

logger = get_logger("training")


def open_model(folder: str) -> Source:
    """The model to guide, as far as the classifier has to fit it.

    Raises:
        UserError: It is no whole model of this program.
    """
    source = open_source(folder)
    if source.scheduler is None or source.autoencoder is None:
        raise UserError(
            f"{folder} does not say which autoencoder, whitening and noise schedule it was trained with.",
            "Give a model that `latent-medi train` wrote, or leave model empty and set objective.",
        )
    return source


def open_parts(
    settings: ClassifierSettings, source: Source | None, device: torch.device
) -> tuple[TrainingData, Validation, Field, tuple[str, ...]]:
    """The rows to train on and those to measure on, the field, and the values in the order of the logits.

    Raises:
        UserError: Data, split, field or value absent; patients in both parts; or latents that are not the model's.
    """
    dataset = open_dataset(settings.data)
    field = chosen_field(dataset, settings.field)
    values = chosen_values(field, settings.values)
    rows = labelled(dataset, field, values, training_rows(dataset, settings.split, settings.split_value))
    store = (
        open_latents(dataset, settings.latents, settings.resident, device)
        if settings.latents
        else stream_latents(dataset, settings.autoencoder, settings.stream, device)
    )
    if store.shape[1] != store.shape[2]:
        raise UserError(f"Latents are square; these are {store.shape[1]}×{store.shape[2]}.")
    encoded_by = store.info["autoencoder"]["hash"]
    if source is not None and source.autoencoder is not None and source.autoencoder["hash"] != encoded_by:
        raise UserError(
            f"The latents are of the autoencoder {encoded_by[:12]}, and {settings.model} was trained on those of "
            f"{source.autoencoder['hash'][:12]}.",
            "Encode the data with the model's autoencoder.",
        )
    table = dataset.index.iloc[rows]
    present = set(table[field.name])
    if empty := [value for value in values if value not in present]:
        raise UserError(
            f"No training patch has {field.name} {', '.join(map(repr, empty))}, so it cannot be learned.",
            "Name the values to tell apart in values.",
        )
    schema = dataset.schema.subset([field.name])
    balance = [field.name] if settings.balance is None else settings.balance
    weights = cell_weights(dataset, rows, balance, settings.balance_temperature)
    info = {"name": dataset.name, "patch_size": dataset.patch_size, "mpp": dataset.info["mpp"]}
    info |= {"training_patients": int(table["patient"].nunique()), "seen": training_record(table, dataset.schema)}
    conditions = Conditions.from_schema(schema, table[[field.name]])
    data = TrainingData(store, rows, table["key"].to_numpy(), schema, conditions, weights, info)

    others = np.zeros(0, np.int64)
    if settings.split and settings.validation_value:
        assert_patient_disjoint(dataset.index, f"{SPLIT_PREFIX}{settings.split}")
        others = training_rows(dataset, settings.split, settings.validation_value)
        others = labelled(dataset, field, values, others)
    table = dataset.index.iloc[others]
    labels = torch.tensor([values.index(str(value)) for value in table[field.name]], dtype=torch.long)
    validation = Validation(store, others, table["key"].to_numpy(), labels, int(table["patient"].nunique()))
    return data, validation, field, values


def chosen_field(dataset: PatchDataset, name: str) -> Field:
    """The field to tell values of apart.

    Raises:
        UserError: There is none of that name (names the closest), no class, or it is a number.
    """
    field = dataset.schema.field(name) if name else dataset.schema.class_field
    if field is None:
        raise UserError(f"{dataset.folder} has no class.", f"Set field to one of {', '.join(dataset.schema.names)}.")
    if field.continuous:
        raise UserError(f"The field {field.name!r} is a number; a classifier tells the values of a vocabulary apart.")
    return field


def chosen_values(field: Field, names: Sequence[str]) -> tuple[str, ...]:
    """The values to tell apart, in the order of the vocabulary.

    Raises:
        UserError: A value that is none of the field's (names the closest), or fewer than two.
    """
    for name in names:
        field.code(name)
    values = tuple(value for value in field.values if not names or value in names)
    if len(values) < 2:
        raise UserError(
            f"There are {len(values)} values of {field.name} to tell apart ({', '.join(values) or 'none'}); a "
            "classifier needs two or more."
        )
    return values


def labelled(dataset: PatchDataset, field: Field, values: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Those of some rows whose value of a field is one of ``values``.

    Raises:
        UserError: A row has no value, not even "unknown".
    """
    refuse_null(dataset, field.name, rows)
    column = dataset.index[field.name].iloc[rows].astype(str)
    kept = rows[column.isin(values).to_numpy()]
    if len(kept) < len(rows):
        logger.info(
            "%s of %s patches are left out: their %s is %s.", f"{len(rows) - len(kept):,}", f"{len(rows):,}",
            field.name, f"{UNKNOWN_WORD} or another" if len(values) < len(field.values) else UNKNOWN_WORD,
        )  # fmt: skip
    return kept
