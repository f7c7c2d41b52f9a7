"""A tiny network."""

from __future__ import annotations

import torch
from parts import small_model

from latent_medi.diffusion.conditioning import MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, build_unet
from latent_medi.metadata.schema import Schema

PATTERNS = {"keep_all": 0.7, "all_null": 0.1, "metadata_null": 0.1, "independent": 0.1, "independent_rate": 0.5}


def make_denoiser(schema: Schema | None, seed: int = 0, patterns: dict[str, float] | None = None) -> Denoiser:
    """A random denoiser of 4×8×8 latents, in eval mode."""
    torch.manual_seed(seed)
    settings = small_model()
    conditioner = None
    if schema is not None:
        conditioner = MetadataConditioner(schema.to_dict(), settings.embed_dim, dropout_patterns=patterns or PATTERNS)
    return Denoiser(build_unet(settings, 4, 8, conditional=schema is not None), conditioner).eval()
