"""Which tensors a run trains when it starts from a model: all, named groups, or only what the source does not have.

What is frozen asks for no gradient, so it has no optimizer state, no weight decay and no average of its own. Of a
tensor that is partly new, such as a vocabulary's table with a further row, the old part is held as a constant and the
new part is a parameter of its own: nothing that acts on parameters can reach the old part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import nn
from torch.nn.utils import parametrize

from latent_medi.core.errors import UserError, nearest
from latent_medi.diffusion.conditioning import embedding_key
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.training.finetune.transfer import Source
from latent_medi.training.settings import PARTS, TrainSettings

TRAINED, FROZEN, NEW_PART = "trained", "frozen", "new part"


@dataclass(frozen=True)
class NewPart:
    """What of a tensor the source does not have.

    Args:
        dim: The dimension along which it grew.
        index: int64 [n]; the new positions along it.
    """

    dim: int
    index: torch.Tensor


def new_parts(source: Source, denoiser: Denoiser) -> dict[str, NewPart | None]:
    """Names of the parameters that are new, with the new part of those that only grew (``None``: all of it)."""
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
            if conditioner.mix is not None:  # its columns for this field started at zero and must learn with it
                width = conditioner.mix.out_features
                columns = torch.arange(position * width, (position + 1) * width)
                if (before := found.get("conditioner.mix.weight")) is not None:
                    columns = torch.cat([before.index, columns])
                found["conditioner.mix.weight"] = NewPart(1, columns)
        elif not known.continuous and known.n_codes > (codes := old.schema.field(known.name).n_codes):
            found[f"{prefix}.codes.weight"] = NewPart(0, torch.arange(codes, known.n_codes))
    return found


def added_values(source: Source, denoiser: Denoiser) -> dict[str, tuple[str, ...]]:
    """Values that the source's fields do not have, by field."""
    if denoiser.conditioner is None or source.conditioner is None:
        return {}
    old = source.conditioner.schema
    grown = {f.name: f.values[len(old.field(f.name).values) :] for f in denoiser.conditioner.schema.fields}
    return {name: values for name, values in grown.items() if values}


def in_part(name: str, part: str) -> bool:
    """Whether a denoiser's parameter belongs to a group of :data:`~latent_medi.training.settings.PARTS` ("new" aside).

    Raises:
        UserError: There is no such group.
    """
    inside = name.removeprefix("unet.")
    if part == "conditioning":
        return name.startswith("conditioner.")
    if part == "attention":
        return ".attentions." in inside
    if part == "time":
        return inside.startswith("time_embedding.") or ".time_emb_proj." in inside
    if part == "down":
        return inside.startswith(("conv_in.", "down_blocks."))
    if part == "mid":
        return inside.startswith("mid_block.")
    if part == "up":
        return inside.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))
    raise UserError(f"There is no part {part!r}; {nearest(part, PARTS)}.", f"The parts are {', '.join(PARTS)}.")


def choose_parts(denoiser: Denoiser, table: pd.DataFrame, source: Source, settings: TrainSettings) -> pd.DataFrame:
    """Freeze what the run does not train.

    Args:
        denoiser: At its start; changed in place.
        table: Of :func:`~latent_medi.training.finetune.transfer.transfer`.
        source: The model it starts from.
        settings: Says what to train.

    Returns:
        The table with the column "training": "trained", "frozen", "new part" (the rest is frozen), or empty for a
        skipped tensor.

    Raises:
        UserError: Nothing is left to train; or an adapter that would need what it cannot hold.
    """
    new = new_parts(source, denoiser)
    if settings.lora is not None:
        _check_adapter(source, denoiser, settings)
    wanted = settings.train_parts or []
    everything = settings.train_parts is None and settings.lora is None
    state: dict[str, str] = {}
    for name, parameter in list(denoiser.named_parameters()):
        if everything or any(in_part(name, part) for part in wanted if part != "new"):
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
        # Vectors of new values alone: what the network learned to leave out is what its own training left out.
        conditioner.register_to_config(dropout_patterns=source.conditioner.config["dropout_patterns"])
    return table.assign(training=[state.get(name, "") for name in table["tensor"]])


def _check_adapter(source: Source, denoiser: Denoiser, settings: TrainSettings) -> None:
    if source.scheduler is None or source.autoencoder is None:
        raise UserError(
            f"{source.folder} is no whole model of this program, which an adapter needs to be sampled with.",
            "Train a model from it without lora first.",
        )
    old = () if source.conditioner is None else source.conditioner.schema.names
    ours = () if denoiser.conditioner is None else denoiser.conditioner.schema.names
    if fields := [name for name in ours if name not in old]:
        raise UserError(
            f"{source.folder} has no field {', '.join(fields)}, and an adapter adds values to fields, not fields.",
            "Leave them out of model.fields, or train without lora.",
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
    """A tensor made of a constant and a trained part."""

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


def fold(module: nn.Module) -> None:
    """Make every tensor of which a part was trained one parameter again, under its own name."""
    for inner in list(module.modules()):
        if parametrize.is_parametrized(inner):
            for tensor in list(_parametrized(inner)):
                parametrize.remove_parametrizations(inner, tensor, leave_parametrized=True)


def _parametrized(module: nn.Module) -> Iterable[str]:
    return dict(module.parametrizations.items())  # type: ignore[union-attr,operator]
