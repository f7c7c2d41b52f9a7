"""Starting a run from another model (the source), exactly at that model, with a table of what was transferred.

A network with a condition input has the same parameters as one without, so the weights of an unconditional source fit,
and conditions whose embeddings start at zero do not change its predictions. The embeddings of a conditional source are
kept; new fields start at zero, and new values of a field at the mean of its values.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from diffusers import UNet2DModel

from latent_medi.core.errors import UserError
from latent_medi.core.files import read_object, sha256_file
from latent_medi.diffusion.conditioning import FieldEmbedding, MetadataConditioner, embedding_key
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.model_folder import REMEDY, check_model, hash_model, local_folder, read_parts
from latent_medi.diffusion.objective import settings_of
from latent_medi.diffusion.settings import DropoutSettings, ModelSettings, ObjectiveSettings
from latent_medi.metadata.schema import FIRST_VALUE, Schema
from latent_medi.training.settings import TrainSettings

COLUMNS = ["tensor", "status", "shape", "note"]


@dataclass
class Source:
    """A model to start from.

    Args:
        folder: Its folder.
        hash: SHA-256 over its weight files.
        unet: Its network.
        conditioner: Its conditioner, or ``None``.
        scheduler: The configuration of its scheduler, or ``None`` for a bare network.
        autoencoder: Content of its autoencoder.json, or ``None`` for a model of another program.
        objective: Its training objective, or ``None`` for a model of another program.
        seen: The combinations it was trained on, see
            :mod:`latent_medi.metadata.training_record`, or ``None`` if not recorded.
    """

    folder: Path
    hash: str
    unet: Any  # a UNet2DModel; diffusers' type stubs hide that it is a module
    conditioner: MetadataConditioner | None
    scheduler: dict[str, Any] | None
    autoencoder: dict[str, Any] | None
    objective: ObjectiveSettings | None
    seen: dict[str, Any] | None = None

    @property
    def model_hash(self) -> str:
        """Its :attr:`~latent_medi.diffusion.pipeline.MediPipeline.model_hash`, which adapters refer to.

        Raises:
            UserError: It is not a complete model of this program.
        """
        if self.scheduler is None or self.autoencoder is None:
            raise UserError(f"{self.folder} is not a complete model of this program.")
        shift, scale = (torch.tensor(self.autoencoder[n], dtype=torch.float32) for n in ("shift", "scale"))
        return hash_model(self.unet, self.conditioner, self.scheduler, self.autoencoder["hash"], shift, scale)


def open_source(folder: str | Path) -> Source:
    """Read a model folder: ours, a diffusers pipeline with a ``unet/`` of class UNet2DModel, or such a network alone.

    Args:
        folder: The folder, or a hub id ``owner/name``, of which only JSON and safetensors are fetched.

    Raises:
        UserError: It is none of these, is damaged, or cannot be downloaded.
    """
    folder = local_folder(folder)
    check_model(folder)
    network = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    if (
        not (network / "config.json").is_file()
        or read_object(network / "config.json").get("_class_name") != "UNet2DModel"
    ):
        raise UserError(
            f"{folder} holds no model to start from.",
            "Give a model of this program, a diffusers pipeline with unet/, or the folder of a diffusers UNet2DModel.",
        )
    weights = sorted([*network.glob("*.safetensors"), *(folder / "conditioning").glob("*.safetensors")])
    if not any(path.parent == network for path in weights):
        raise UserError(f"{network} has no .safetensors weights.", "Convert the weights; pickles are not loaded.")
    digest = hashlib.sha256("".join(sha256_file(path) for path in weights).encode()).hexdigest()
    conditioning = folder / "conditioning"
    scheduler, parts = folder / "scheduler" / "scheduler_config.json", read_parts(folder)
    try:
        unet = UNet2DModel.from_pretrained(network, use_safetensors=True, low_cpu_mem_usage=False).float()
        conditioner = None
        if conditioning.is_dir():
            conditioner = MetadataConditioner.from_pretrained(conditioning, low_cpu_mem_usage=False).float()
    except UserError:
        raise
    except Exception as error:  # safetensors, JSON, shapes and missing files each have their own
        raise UserError(f"The model in {folder} cannot be loaded: {error}", REMEDY) from error
    return Source(
        folder,
        digest,
        unet,
        conditioner,
        read_object(scheduler) if scheduler.is_file() else None,
        parts["autoencoder"],
        parts["objective"],
        (parts["provenance"] or {}).get("seen"),
    )


def inherited_objective(source: Source, settings: TrainSettings) -> ObjectiveSettings:
    """The source's objective, with the parts named in ``override`` taken from the settings.

    Parts are "prediction", "schedule" and "weighting". A source of another program does not record its weighting and
    loss, so those of the settings are used.
    """
    own = settings.objective
    if source.scheduler is None:
        return own
    old = source.objective or own
    result = settings_of(source.scheduler, weighting=old.weighting, gamma=old.gamma, loss=old.loss)
    parts = {
        "prediction": ("prediction",),
        "schedule": ("schedule", "beta_start", "beta_end", "timesteps", "zero_terminal_snr"),
        "weighting": ("weighting", "gamma", "loss"),
    }
    for part, names in parts.items():
        if part in settings.override:
            for name in names:
                setattr(result, name, getattr(own, name))
    return result


def transferred_schema(source: Source | None, own: Schema | None) -> Schema | None:
    """The fields of the new model: those of the source with unchanged codes, then those that only the data have.

    ``None`` for a model without fields.

    Raises:
        UserError: The source is conditional and the new model is not; or a field differs in kind or unit.
    """
    if source is None or source.conditioner is None:
        return own
    if own is None:
        raise UserError(
            f"{source.folder} is conditional, and model.fields is empty: an unconditional model cannot start at it.",
            "Leave out model.fields, or start from an unconditional model.",
        )
    return Schema.merge(source.conditioner.schema, own)


def transfer(
    source: Source,
    schema: Schema | None,
    model: ModelSettings,
    dropout: DropoutSettings,
    latent_shape: tuple[int, int, int],
) -> tuple[Denoiser, pd.DataFrame]:
    """A denoiser that predicts exactly what the source predicts, for every condition that the source knows.

    Args:
        source: The model to start from; the architecture of its network is kept.
        schema: From :func:`transferred_schema`.
        model: Fusion and widths of a new conditioner. A conditional source keeps its fusion unless new fields need
            another.
        dropout: Condition dropout of the new training.
        latent_shape: (C, h, w) of the data.

    Returns:
        The denoiser, and a row per tensor: tensor, status (loaded, new, skipped), shape, note.

    Raises:
        UserError: The latents do not fit, or a concatenating conditioner has no room for a new field.
    """
    config = dict(source.unet.config)
    if (config["in_channels"], config["out_channels"]) != (latent_shape[0], latent_shape[0]):
        raise UserError(
            f"{source.folder} works on {config['in_channels']} channels; the latents have {latent_shape[0]}.",
            "Encode the data with the source's autoencoder.",
        )
    conditional = schema is not None
    unet = UNet2DModel.from_config(
        {**config, "class_embed_type": "identity" if conditional else None, "num_class_embeds": None}
    )
    rows = _load_network(unet, source)
    conditioner = None
    if schema is not None:
        conditioner = _new_conditioner(source, schema, model, dropout, 4 * config["block_out_channels"][0])
        rows += _load_conditioner(conditioner, source.conditioner)
    return Denoiser(unet, conditioner), pd.DataFrame(rows, columns=COLUMNS)


def _row(name: str, status: str, tensor: torch.Tensor, note: str = "") -> dict[str, str]:
    return {"tensor": name, "status": status, "shape": "×".join(map(str, tensor.shape)), "note": note}


def _load_network(unet: Any, source: Source) -> list[dict[str, str]]:
    theirs = source.unet.state_dict()
    missing, extra = unet.load_state_dict(theirs, strict=False)
    if missing:  # impossible with the source's own configuration; training must not continue if it happens
        raise UserError(f"{source.folder} lacks the weights {', '.join(missing[:5])}.")
    skipped = [
        _row(f"unet.{n}", "skipped", theirs[n], "the source's class input is replaced by conditions") for n in extra
    ]
    return [_row(f"unet.{n}", "loaded", t) for n, t in unet.state_dict().items()] + skipped


def _new_conditioner(
    source: Source, schema: Schema, model: ModelSettings, dropout: DropoutSettings, width: int
) -> MetadataConditioner:
    old, widths = source.conditioner, model.widths
    fusion: str = model.fusion
    if old is not None:
        added = [name for name in schema.names if name not in old.schema.names]
        if not added:
            fusion, widths = old.fusion, old.config["widths"]
        elif old.fusion == "concat" and fusion != "additive":
            raise UserError(
                f"{source.folder} concatenates its fields over the whole width: no room for {', '.join(added)}.",
                "Set model.fusion=additive: its embeddings are then padded with zeros, which is the same model.",
            )
        elif old.fusion != "concat":
            fusion, widths = old.fusion, None
        else:
            widths = None
    patterns = asdict(dropout)
    return MetadataConditioner(schema.to_dict(), width, fusion=fusion, widths=widths, dropout_patterns=patterns)


@torch.no_grad()
def _load_conditioner(new: MetadataConditioner, old: MetadataConditioner | None) -> list[dict[str, str]]:
    """Copy the embeddings of the old fields and start new fields at zero."""
    if old is None:
        new.zero_init()
        return [_row(f"conditioner.{n}", "new", t, "z_cond starts at zero") for n, t in new.state_dict().items()]
    notes: dict[str, tuple[str, str]] = {}
    offset = 0
    for known in old.schema.fields:  # a concatenated field keeps its place in the width
        key = embedding_key(known.name)
        theirs: FieldEmbedding = old.embeddings[key]  # type: ignore[assignment]
        ours: FieldEmbedding = new.embeddings[key]  # type: ignore[assignment]
        part = theirs.codes.weight.shape[1]
        start = offset if old.fusion == "concat" and new.fusion == "additive" else 0
        offset += part
        grown = _copy_embedding(theirs, ours, slice(start, start + part))
        note = f"{grown} new values start at the mean" if grown else ""
        for name, _ in ours.named_parameters():
            notes[f"embeddings.{key}.{name}"] = ("loaded", note if name == "codes.weight" else "")
    for known in new.schema.fields:
        if known.name not in old.schema.names:
            key = embedding_key(known.name)
            if new.mix is None:
                new.embeddings[key].zero()  # type: ignore[operator]
            for name, _ in new.embeddings[key].named_parameters():
                notes[f"embeddings.{key}.{name}"] = ("new", "adds zero at the start")
    if new.mix is not None and old.mix is not None:
        width = new.mix.out_features
        new.mix.weight.zero_()
        for i, name in enumerate(old.schema.names):
            j = new.schema.names.index(name)
            new.mix.weight[:, j * width : (j + 1) * width] = old.mix.weight[:, i * width : (i + 1) * width]
        new.mix.bias.copy_(old.mix.bias)
        notes |= {"mix.weight": ("loaded", ""), "mix.bias": ("loaded", "")}
    return [_row(f"conditioner.{n}", notes[n][0], tensor, notes[n][1]) for n, tensor in new.state_dict().items()]


def _copy_embedding(old: FieldEmbedding, new: FieldEmbedding, columns: slice) -> int:
    """Copy a field's vectors into some columns of the new ones, the others zero; returns the number of new values."""
    new.zero()
    table = old.codes.weight
    new.codes.weight[: len(table), columns] = table
    grown = len(new.codes.weight) - len(table)
    if grown and len(table) > FIRST_VALUE:
        new.codes.weight[len(table) :, columns] = table[FIRST_VALUE:].mean(0)
    if old.continuous:
        new.value.weight[columns] = old.value.weight
        new.value.bias[columns] = old.value.bias
    return grown


def describe_table(table: pd.DataFrame) -> str:
    """The counts of the table, such as "312 loaded, 4 new; 300 frozen, 16 trained"."""
    columns = [table["status"]]
    if "training" in table:
        columns.append(table.loc[table["training"] != "", "training"])
    counts = [column.value_counts().items() for column in columns]
    return "; ".join(", ".join(f"{count} {word}" for word, count in each) for each in counts)


def with_adapter(table: pd.DataFrame, denoiser: Denoiser, before: set[str]) -> pd.DataFrame:
    """The table with a further row per matrix of the adapter.

    Args:
        table: Without the adapter.
        denoiser: With the adapter.
        before: Names of the parameters that it had without the adapter.
    """
    # peft renames the parameters of an adapted layer, which are frozen, so those with a gradient are the adapter's.
    added = [(n, p) for n, p in denoiser.named_parameters() if p.requires_grad and n not in before]
    rows = [{**_row(name, "new", p, "low-rank update, zero at the start"), "training": "trained"} for name, p in added]
    return pd.concat([table, pd.DataFrame(rows)], ignore_index=True)
