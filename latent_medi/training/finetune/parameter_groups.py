"""The parameters that a fine-tuning run trains: all, named groups, or only those that the source does not have.

A frozen parameter has no gradient, no optimizer state, no weight decay and no average of its own. If only part of a
tensor is new, such as a further row of a vocabulary's table, the old part is kept as a constant and the new part
becomes a parameter of its own, so that no optimizer can change the old part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize

from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import embedding_key
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.training.finetune.transfer import Source
from latent_medi.training.settings import PARAMETER_GROUPS, TrainSettings

M = TypeVar("M", bound=nn.Module)

TRAINED, FROZEN, NEW_PART = "trained", "frozen", "new part"


@dataclass(frozen=True)
class NewPart:
    """The part of a tensor that the source does not have.

    Args:
        dim: The dimension along which the tensor grew.
        index: int64 [n]; the new positions along that dimension.
    """

    dim: int
    index: torch.Tensor


def new_parameters(source: Source, denoiser: Denoiser) -> dict[str, NewPart | None]:
    """Names of the parameters that are new, with the new part of those that only grew (``None``: the whole tensor)."""
    conditioner, old = denoiser.conditioner, source.conditioner
    if conditioner is None:
        return {}
    if old is None:
        return {f"conditioner.{name}": None for name, _ in conditioner.named_parameters()}
    found: dict[str, NewPart | None] = {}
    for position, known in enumerate(conditioner.schema.fields):
        prefix = f"conditioner.embeddings.{embedding_key(known.name)}"
        if known.name not in old.schema.names:
            embedding = conditioner.embeddings[embedding_key(known.name)]
            found |= {f"{prefix}.{name}": None for name, _ in embedding.named_parameters()}
            if conditioner.mix is not None:  # its columns for this field started at zero and are trained with it
                width = conditioner.mix.out_features
                columns = torch.arange(position * width, (position + 1) * width)
                if (before := found.get("conditioner.mix.weight")) is not None:
                    columns = torch.cat([before.index, columns])
                found["conditioner.mix.weight"] = NewPart(1, columns)
        elif not known.continuous and known.n_codes > (codes := old.schema.field(known.name).n_codes):
            found[f"{prefix}.codes.weight"] = NewPart(0, torch.arange(codes, known.n_codes))
    return found


def tables_of_new_fields(source: Source, denoiser: Denoiser) -> set[str]:
    """Names of the parameters with the vectors of fields that the source does not have, if they begin at zero."""
    conditioner = denoiser.conditioner
    if conditioner is None or conditioner.mix is not None:  # there the map of the vectors begins at zero, not they
        return set()
    old = () if source.conditioner is None else source.conditioner.schema.names
    new = [known.name for known in conditioner.schema.fields if known.name not in old]
    return {f"conditioner.embeddings.{embedding_key(name)}.codes.weight" for name in new}


def added_values(source: Source, denoiser: Denoiser) -> dict[str, tuple[str, ...]]:
    """Values by field that the source does not have."""
    if denoiser.conditioner is None or source.conditioner is None:
        return {}
    old = source.conditioner.schema
    grown = {f.name: f.values[len(old.field(f.name).values) :] for f in denoiser.conditioner.schema.fields}
    return {name: values for name, values in grown.items() if values}


def in_group(name: str, group: str) -> bool:
    """Whether a denoiser's parameter belongs to a group of :data:`~latent_medi.training.settings.PARAMETER_GROUPS`.

    The group "new" depends on the source, see :func:`new_parameters`.

    Raises:
        ValueError: There is no such group.
    """
    inside = name.removeprefix("unet.")
    if group == "conditioning":
        return name.startswith("conditioner.")
    if group == "attention":
        return ".attentions." in inside
    if group == "time":
        return inside.startswith("time_embedding.") or ".time_emb_proj." in inside
    if group == "down":
        return inside.startswith(("conv_in.", "down_blocks."))
    if group == "mid":
        return inside.startswith("mid_block.")
    if group == "up":
        return inside.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))
    raise ValueError(f"There is no group {group!r}; there are {', '.join(PARAMETER_GROUPS)}.")


def freeze_others(denoiser: Denoiser, table: pd.DataFrame, source: Source, settings: TrainSettings) -> pd.DataFrame:
    """Freeze the parameters that a run does not train.

    Args:
        denoiser: Before training; changed in place.
        table: From :func:`~latent_medi.training.finetune.transfer.transfer`.
        source: The model to start from.
        settings: The run.

    Returns:
        The table with the column "training": "trained", "frozen", "new part" (the rest is frozen), or empty for a
        skipped tensor.

    Raises:
        UserError: Nothing is left to train; or an adapter cannot hold what the data need.
    """
    new = new_parameters(source, denoiser)
    if settings.lora is not None:
        _check_adapter(source, denoiser, settings)
    wanted = settings.train_parts or []
    everything = settings.train_parts is None and settings.lora is None
    state: dict[str, str] = {}
    for name, parameter in list(denoiser.named_parameters()):
        if everything or any(in_group(name, group) for group in wanted if group != "new"):
            state[name] = TRAINED
        elif "new" in wanted and name in new:
            part = new[name]
            state[name] = TRAINED if part is None else NEW_PART
            if part is not None:
                _hold_old_part(denoiser, name, part)
        else:
            parameter.requires_grad_(False)
            state[name] = FROZEN
    if settings.lora is None and not set(state.values()) & {TRAINED, NEW_PART}:
        raise UserError(
            f"train_parts={settings.train_parts} leaves nothing to train: {source.folder} knows every field and value.",
            "Give data with a new value in a field, or train other parts.",
        )
    conditioner = denoiser.conditioner
    if conditioner is not None and source.conditioner is not None and TRAINED not in state.values():
        # Only vectors of new values are trained, so the network still knows the dropout patterns of its own training.
        conditioner.register_to_config(dropout_patterns=source.conditioner.config["dropout_patterns"])
    return table.assign(training=[state.get(name, "") for name in table["tensor"]])


def _check_adapter(source: Source, denoiser: Denoiser, settings: TrainSettings) -> None:
    if source.scheduler is None or source.autoencoder is None:
        raise UserError(
            f"{source.folder} is not a complete model of this program, and an adapter can only be sampled with one.",
            "First train a model from it without lora.",
        )
    old = () if source.conditioner is None else source.conditioner.schema.names
    ours = () if denoiser.conditioner is None else denoiser.conditioner.schema.names
    if fields := [name for name in ours if name not in old]:
        raise UserError(
            f"{source.folder} has no field {', '.join(fields)}, and an adapter adds values to fields, not fields.",
            "First train them alone (train_parts=[new]), and start the adapter from that model; or train without lora.",
        )
    added = {f"{name} {', '.join(values)}" for name, values in added_values(source, denoiser).items()}
    if added and settings.train_parts is None:
        raise UserError(
            f"The data have values that {source.folder} does not know: {'; '.join(sorted(added))}.",
            "Set train_parts=[new], which trains their vectors and stores them in the adapter.",
        )
    if not added and settings.train_parts is not None:
        raise UserError(f"{source.folder} knows every value of the data: nothing is new.", "Leave out train_parts.")


class _Grown(nn.Module):
    """Parametrization of a tensor by its new part; the rest is constant."""

    index: torch.Tensor
    whole: torch.Tensor

    def __init__(self, whole: torch.Tensor, part: NewPart) -> None:
        super().__init__()
        self.dim = part.dim
        self.register_buffer("index", part.index, persistent=False)
        self.register_buffer("whole", whole.detach().clone(), persistent=False)

    def forward(self, new: torch.Tensor) -> torch.Tensor:
        return self.whole.index_copy(self.dim, self.index, new)

    def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.index_select(self.dim, self.index)


def _hold_old_part(denoiser: Denoiser, name: str, part: NewPart) -> None:
    path, tensor = name.rsplit(".", 1)
    module = denoiser.get_submodule(path)
    parametrize.register_parametrization(module, tensor, _Grown(getattr(module, tensor), part))


def folded(module: M) -> M:
    """The module with every tensor with a new part as one parameter under its own name; a copy if there is any."""
    if not any(parametrize.is_parametrized(inner) for inner in module.modules()):
        return module
    whole = copy.deepcopy(module)
    for inner in list(whole.modules()):
        if parametrize.is_parametrized(inner):
            for tensor in list(_parametrized(inner)):
                parametrize.remove_parametrizations(inner, tensor, leave_parametrized=True)
    return whole


def _parametrized(module: nn.Module) -> Iterable[str]:
    return dict(module.parametrizations.items())  # type: ignore[union-attr,operator]
