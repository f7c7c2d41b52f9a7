"""A tiny network and autoencoder."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL

from latent_medi.diffusion.conditioning import MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, build_unet
from latent_medi.diffusion.settings import ModelSettings
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.metadata.schema import Schema

PATTERNS = {"keep_all": 0.7, "all_null": 0.1, "metadata_null": 0.1, "independent": 0.1, "independent_rate": 0.5}


def small_model() -> ModelSettings:
    """A network of 0.2 M parameters."""
    return ModelSettings(
        block_out_channels=[16, 32],
        layers_per_block=1,
        attention=[False, True],
        attention_head_dim=16,
        norm_num_groups=8,
    )


def make_denoiser(schema: Schema | None, seed: int = 0, patterns: dict[str, float] | None = None) -> Denoiser:
    """A random denoiser of 4×8×8 latents, in eval mode."""
    torch.manual_seed(seed)
    settings = small_model()
    conditioner = None
    if schema is not None:
        conditioner = MetadataConditioner(schema.to_dict(), settings.embed_dim, dropout_patterns=patterns or PATTERNS)
    return Denoiser(build_unet(settings, 4, 8, conditional=schema is not None), conditioner).eval()


def make_autoencoder(seed: int = 0) -> Autoencoder:
    """A random AutoencoderKL, 4 channels, 4× down."""
    torch.manual_seed(seed)
    model = AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=32,
    )
    return Autoencoder(model, "random")
