"""Conditions as codes and values, their embedding for the denoiser, and condition dropout.

z_cond = concat(z_class, z_meta,1 … z_meta,k) ∈ R^{d_t} is added to the timestep embedding, which every residual block
receives.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from latent_medi.core.errors import UserError
from latent_medi.diffusion.settings import DropoutSettings
from latent_medi.latents.autoencoder import in_own_memory
from latent_medi.metadata.schema import FIRST_VALUE, NULL, UNKNOWN, Field, Schema

_FREQUENCIES = 16


@dataclass
class Conditions:
    """The conditions of N samples: a code and a value per field of a schema, in its order.

    Args:
        codes: int64 [N, F]; for a continuous field its state (null, unknown, value).
        values: fp32 [N, F]; standardised value of a continuous field, 0 without one.
    """

    codes: torch.Tensor
    values: torch.Tensor

    @staticmethod
    def from_schema(
        schema: Schema, table: pd.DataFrame | Sequence[Mapping[str, Any]], absent: Literal["error", "null"] = "null"
    ) -> Conditions:
        """Encode rows by name.

        Args:
            schema: The fields.
            table: A row per sample.
            absent: Whether a field that is not given is null or an error.

        Raises:
            UserError: A value is not in the schema.
        """
        codes, values = schema.encode(table, absent=absent)
        return Conditions(torch.from_numpy(codes), torch.from_numpy(values))

    def __len__(self) -> int:
        return self.codes.shape[0]

    def to(self, device: torch.device | str) -> Conditions:
        """The same on a device."""
        return Conditions(self.codes.to(device, non_blocking=True), self.values.to(device, non_blocking=True))

    def rows(self, which: torch.Tensor | np.ndarray | slice | Sequence[int]) -> Conditions:
        """The conditions of some samples."""
        index = which if isinstance(which, slice) else torch.as_tensor(which, device=self.codes.device)
        return Conditions(self.codes[index], self.values[index])

    def masked(self, keep: torch.Tensor) -> Conditions:
        """Null wherever ``keep`` (bool [F] or [N, F]) is false."""
        keep = keep.to(self.codes.device)
        return Conditions(torch.where(keep, self.codes, NULL), torch.where(keep, self.values, 0.0))

    def null_like(self) -> Conditions:
        """As many samples with every condition null."""
        return Conditions(torch.full_like(self.codes, NULL), torch.zeros_like(self.values))

    def repeat(self, count: int) -> Conditions:
        """``count`` copies of a single sample's conditions."""
        return Conditions(self.codes.expand(count, -1).clone(), self.values.expand(count, -1).clone())

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """All samples of the parts, in order."""
        return Conditions(torch.cat([p.codes for p in parts]), torch.cat([p.values for p in parts]))


def default_widths(schema: Schema, embed_dim: int) -> dict[str, int]:
    """Width per field: ⌊d_t/(1+k)⌋ for each of k metadata fields, and that with the remainder for the class.

    Without a class field the k fields share d_t, and the first gets the remainder.
    """
    parts = len(schema.fields)
    if not parts:
        return {}
    each = embed_dim // parts
    return {f.name: each + (embed_dim - each * parts if i == 0 else 0) for i, f in enumerate(schema.fields)}


def fourier_features(values: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of standardised values, fp32 [N] to fp32 [N, 32].

    Standardised values span about ±3. Periods range from 64 (monotone over the data) to 1/4 of a standard deviation.
    """
    frequencies = torch.logspace(math.log2(1 / 64), math.log2(4), _FREQUENCIES, base=2, device=values.device)
    angles = 2 * math.pi * values.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class FieldEmbedding(nn.Module):
    """Vector of one field: a table row per code; for a continuous value a linear map of its Fourier features.

    Args:
        known: The field.
        width: Width of the vector.
    """

    def __init__(self, known: Field, width: int) -> None:
        super().__init__()
        self.continuous = known.continuous
        self.codes = nn.Embedding(FIRST_VALUE if known.continuous else known.n_codes, width)
        if known.continuous:
            self.value = nn.Linear(2 * _FREQUENCIES, width)

    def forward(self, codes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """int64 [N] codes and fp32 [N] values to [N, width]."""
        if not self.continuous:
            return self.codes(codes)
        features = fourier_features(values).to(self.value.weight.dtype)
        state = self.codes(codes.clamp(max=UNKNOWN))
        return torch.where((codes == FIRST_VALUE)[:, None], self.value(features), state)

    @torch.no_grad()
    def zero(self) -> None:
        """Make every output exactly zero; the weights still receive gradients."""
        self.codes.weight.zero_()
        if self.continuous:
            self.value.weight.zero_()
            self.value.bias.zero_()


class MetadataConditioner(ModelMixin, ConfigMixin):
    """Maps conditions to the vector z_cond, which is added to the timestep embedding.

    Args:
        schema: A metadata schema's ``to_dict()``.
        time_embed_dim: Width d_t.
        fields: Names of the fields to use; unset: all.
        fusion: "concat", "additive" or "linear"; see :class:`~latent_medi.diffusion.settings.ModelSettings`.
        widths: For "concat", width by field, summing to d_t; unset: :func:`default_widths`.
        dropout_patterns: The :class:`~latent_medi.diffusion.settings.DropoutSettings` of its training, as a dict;
            guidance refuses patterns that these do not cover. Unset: every sample keeps all conditions.

    Raises:
        UserError: There is no field, or widths do not fit.
    """

    config_name = "config.json"  # type: ignore[assignment]

    @register_to_config
    def __init__(
        self,
        schema: dict[str, Any],
        time_embed_dim: int,
        fields: list[str] | None = None,
        fusion: str = "concat",
        widths: dict[str, int] | None = None,
        dropout_patterns: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        whole = Schema.from_dict(schema)
        known = whole if fields is None else whole.subset(fields)
        if not known.fields:
            raise UserError("A conditioner needs at least one field.", "Use no conditioner for an unconditional model.")
        if fusion not in ("concat", "additive", "linear"):
            raise UserError(f"There is no fusion {fusion!r}; there are concat, additive and linear.")
        if widths is not None and fusion != "concat":
            raise UserError(f"Widths per field need fusion=concat, not {fusion}.")
        patterns = asdict(DropoutSettings(1.0, 0.0, 0.0, 0.0)) if dropout_patterns is None else dict(dropout_patterns)
        DropoutSettings(**patterns).check()
        if fusion == "concat":
            chosen = (
                default_widths(known, time_embed_dim) if widths is None else {str(n): int(w) for n, w in widths.items()}
            )
            if set(chosen) != set(known.names) or sum(chosen.values()) != time_embed_dim or min(chosen.values()) < 1:
                raise UserError(
                    f"The widths {chosen} must be >= 1 for each of {list(known.names)} and sum to {time_embed_dim}."
                )
        else:
            chosen = dict.fromkeys(known.names, time_embed_dim)
        self.register_to_config(schema=known.to_dict(), fields=list(known.names), dropout_patterns=patterns)
        self._schema = known
        self.fusion = fusion
        self.embeddings = nn.ModuleDict()
        for f in known.fields:
            key = embedding_key(f.name)
            if key in self.embeddings:
                raise UserError(
                    f"The field {f.name!r} differs from another one by punctuation only.", "Rename one of them."
                )
            self.embeddings[key] = FieldEmbedding(f, chosen[f.name])
        self.mix = nn.Linear(len(known.fields) * time_embed_dim, time_embed_dim) if fusion == "linear" else None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> MetadataConditioner:
        """As for any diffusers model, with the weights copied out of the file."""
        return cast(MetadataConditioner, in_own_memory(super().from_pretrained(*args, **kwargs)))

    @property
    def schema(self) -> Schema:
        """Its fields; :class:`Conditions` follow their order."""
        return self._schema

    @property
    def patterns(self) -> DropoutSettings:
        """The dropout patterns of its training."""
        return DropoutSettings(**self.config["dropout_patterns"])

    def forward(self, conditions: Conditions) -> torch.Tensor:
        """Conditions of N samples to z_cond [N, d_t]."""
        parts = [
            embedding(conditions.codes[:, i], conditions.values[:, i])
            for i, embedding in enumerate(self.embeddings.values())
        ]
        if self.fusion == "additive":
            return torch.stack(parts).sum(0)
        joined = torch.cat(parts, dim=1)
        return joined if self.mix is None else self.mix(joined)

    @torch.no_grad()
    def zero_init(self) -> None:
        """Make z_cond exactly zero for every condition, so that it does not change the network's predictions."""
        if self.mix is not None:
            self.mix.weight.zero_()
            self.mix.bias.zero_()
            return
        for embedding in self.embeddings.values():
            cast(FieldEmbedding, embedding).zero()

    @torch.no_grad()
    def append(
        self, field_name: str, values: Sequence[str], start: Literal["mean", "unknown", "zero"] = "mean"
    ) -> None:
        """Add values to a vocabulary, such as a new hospital; the vectors of all other values stay unchanged.

        Args:
            field_name: A class or categorical field.
            values: New values, which get the next codes in this order.
            start: Their initial vector: the mean over the known values, that of "unknown", or zero.

        Raises:
            UserError: The field is continuous or unknown, or it already has a value.
        """
        self._schema = self._schema.append(field_name, values)
        embedding = cast(FieldEmbedding, self.embeddings[embedding_key(field_name)])
        old = embedding.codes.weight
        if start == "mean" and len(old) > FIRST_VALUE:
            row = old[FIRST_VALUE:].mean(0)
        elif start == "zero":
            row = torch.zeros_like(old[0])
        else:
            row = old[UNKNOWN]
        grown = nn.Embedding(len(old) + len(values), old.shape[1], device=old.device, dtype=old.dtype)
        grown.weight.copy_(torch.cat([old, row.expand(len(values), -1)]))
        grown.weight.requires_grad_(old.requires_grad)
        embedding.codes = grown
        self.register_to_config(schema=self._schema.to_dict())


def embedding_key(field_name: str) -> str:
    """Name of a field's embedding in the conditioner; its prefix avoids clashes with attributes of the container."""
    return "field_" + re.sub(r"\W", "_", field_name)


def draw_dropout(
    conditions: Conditions, settings: DropoutSettings, generator: torch.Generator | None, schema: Schema
) -> Conditions:
    """Drop conditions by a pattern drawn for each sample.

    Args:
        conditions: Of N samples over ``schema``'s fields.
        settings: Share of each pattern.
        generator: On the device of the conditions.
        schema: Says which field is the class.

    Returns:
        The conditions with NULL where dropped.
    """
    settings.check()
    device, (count, fields) = conditions.codes.device, conditions.codes.shape
    listed = [settings.keep_all, settings.all_null, settings.metadata_null, settings.independent]
    shares = torch.tensor(listed, dtype=torch.float64, device=device)
    draw = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
    alone = (
        torch.rand(count, fields, generator=generator, device=device, dtype=torch.float64) >= settings.independent_rate
    )
    # Rounded, the shares may sum to less than 1; the rest belongs to the last pattern with a share.
    last = max(i for i, share in enumerate(listed) if share)
    pattern = torch.searchsorted(shares.cumsum(0), draw, right=True).clamp(max=last)
    everything = torch.ones(fields, dtype=torch.bool, device=device)
    is_class = torch.tensor([f.kind == "class" for f in schema.fields], dtype=torch.bool, device=device)
    fixed = torch.stack([everything, ~everything, is_class])
    keep = torch.where((pattern < len(fixed))[:, None], fixed[pattern.clamp(max=len(fixed) - 1)], alone)
    return conditions.masked(keep)
