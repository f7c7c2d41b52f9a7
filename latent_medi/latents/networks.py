"""The supported kinds of autoencoder networks, each from pixels to moments and from latents to pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import nn

from latent_medi.core.errors import UserError
from latent_medi.latents.taef2 import AutoencoderTAEF2

Moments = tuple[torch.Tensor, torch.Tensor | None]
"""Mean of a posterior, and its standard deviation or ``None``."""

KINDS: dict[str, Any] = {
    "AutoencoderKL": AutoencoderKL,
    "AutoencoderTiny": AutoencoderTiny,
    "AutoencoderDC": AutoencoderDC,
    "AutoencoderTAEF2": AutoencoderTAEF2,
}


def check_kind(model: Any) -> None:
    """Refuse a network that is no supported autoencoder.

    Raises:
        UserError: Lists those that are.
    """
    if (kind := type(model).__name__) not in KINDS:
        raise UserError(f"{kind} is not a supported autoencoder; supported are {', '.join(KINDS)}.")


def deterministic(model: Any) -> bool:
    """Whether a network of a supported kind gives a latent instead of a posterior."""
    return not isinstance(model, AutoencoderKL)


def moments_of(model: Any, x: torch.Tensor, dtype: torch.dtype = torch.float32) -> Moments:
    """Posterior moments of images as a network of a supported kind gives them; differentiable.

    Args:
        model: The network.
        x: fp32 [n, 3, H, W] in [0, 1].
        dtype: Precision of the network.

    Returns:
        Mean fp32 [n, C, h, w], and standard deviation of the same shape or ``None`` for a deterministic autoencoder.
    """
    if isinstance(model, AutoencoderTAEF2):
        return model.encode(x.to(dtype)).float(), None
    encoded = model.encode((x * 2 - 1).to(dtype))
    if isinstance(model, AutoencoderKL):
        return encoded.latent_dist.mean.float(), encoded.latent_dist.std.float()
    return (encoded.latents if isinstance(model, AutoencoderTiny) else encoded.latent).float(), None


def pixels_of(model: Any, latents: torch.Tensor) -> torch.Tensor:
    """Images of raw latents [n, C, h, w] in the network's precision: fp32 [n, 3, H, W], about [0, 1], not clamped;
    differentiable."""
    if isinstance(model, AutoencoderTAEF2):
        return model.decode(latents).float()
    return model.decode(latents).sample.float() / 2 + 0.5


def to_images(x: torch.Tensor) -> np.ndarray:
    """Pixels [n, 3, H, W] as uint8 [n, H, W, 3] on the CPU, clamped to [0, 1] and rounded."""
    images = (x.clamp(0, 1) * 255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def factor_of(model: Any) -> int:
    """Pixels per latent pixel along an edge, of a network of a supported kind."""
    if isinstance(model, AutoencoderTAEF2):
        return 8
    if isinstance(model, (AutoencoderTiny, AutoencoderDC)):
        return int(2 ** (len(model.config["encoder_block_out_channels"]) - 1))
    return int(2 ** (len(model.config["block_out_channels"]) - 1))


def latents_fit(autoencoder: Mapping[str, Any], encoded_by: str) -> bool:
    """Whether an autoencoder decodes the latents of the one with hash ``encoded_by``.

    Args:
        autoencoder: Its description, see :attr:`latent_medi.latents.autoencoder.Autoencoder.description`.
        encoded_by: Hash of the autoencoder that encoded the latents.
    """
    return encoded_by in (autoencoder["hash"], *autoencoder.get("latents_of", ()))


def weight_hash(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and fp32 values of all weights, in order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
