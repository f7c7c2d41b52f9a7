"""A small autoencoder with 32 latent channels (TAEF2), whose pooled branch AutoencoderTiny does not have."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from latent_medi.core.errors import UserError

ENCODER_FILE, DECODER_FILE = "taef2_encoder.pth", "taef2_decoder.pth"


class _Clamp(nn.Module):
    """3·tanh(x/3), which hardly changes usual latents and bounds the others."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    """Three convolutions with a skip; at the lowest resolution a normalised 1×1 branch is added to the input first."""

    def __init__(self, width: int, pool: bool) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.pool: nn.Module | None = None
        if pool:
            wider, narrower = (nn.Conv2d(a * width, b * width, 1, bias=False) for a, b in ((1, 4), (4, 1)))
            self.pool = nn.Sequential(wider, nn.GroupNorm(4, 4 * width), nn.ReLU(), narrower)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class AutoencoderTAEF2(ModelMixin, ConfigMixin):
    """Deterministic, 8× down; images in [0, 1] in and out, latents unscaled.

    Args:
        latent_channels: Channels of a latent.
        width: Channels of every hidden layer.
        blocks: Blocks per stage.
    """

    config_name = "config.json"  # type: ignore[assignment]

    @register_to_config
    def __init__(self, latent_channels: int = 32, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        down: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), _Block(width, pool=False)]
        for stage in range(3):
            down.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            down += [_Block(width, pool=stage == 2) for _ in range(blocks)]
        self.encoder = nn.Sequential(*down, nn.Conv2d(width, latent_channels, 3, padding=1))
        up: list[nn.Module] = [_Clamp(), nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU()]
        for stage in range(3):
            up += [_Block(width, pool=stage == 0) for _ in range(blocks)]
            up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*up, _Block(width, pool=False), nn.Conv2d(width, 3, 3, padding=1))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] in [0, 1] to latents [N, C, H/8, W/8]."""
        return self.encoder(images)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents to images [N, 3, H, W], about [0, 1] and not clamped."""
        return self.decoder(latents)

    @staticmethod
    def from_state_dicts(encoder: str | Path, decoder: str | Path) -> AutoencoderTAEF2:
        """Load the two published state dicts, in fp32.

        Raises:
            UserError: A file is absent, does not only hold tensors, or does not fit.
        """
        weights = {f"encoder.{k}": v for k, v in _tensors(Path(encoder)).items()}
        weights |= {f"decoder.{k}": v for k, v in _tensors(Path(decoder)).items()}
        model = AutoencoderTAEF2()
        try:
            model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=True)
        except RuntimeError as error:
            raise UserError(f"{encoder} and {decoder} are not the TAEF2 weights: {error}") from None
        return model


def _tensors(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.", f"The folder needs {ENCODER_FILE} and {DECODER_FILE}.") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path} is not a plain file of tensors and was not opened: {str(error).splitlines()[0]}"
        ) from None
