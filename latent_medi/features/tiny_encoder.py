"""A small convolutional image encoder for 64 px patches, quick enough for two CPU cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latent_medi.core.checksums import verify_checksums, write_checksums
from latent_medi.core.errors import UserError
from latent_medi.core.files import atomic_path, read_object, write_json


class _Block(nn.Module):
    """Pre-activation residual block without change of size."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.GroupNorm(groups, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class TinyEncoder(nn.Module):
    """Convolutional encoder with mean and standard-deviation pooling.

    Args:
        config: ``dim`` (output width), ``channels`` (one entry per stage, each halves the size), ``groups`` (group
            normalisation),
            ``image_size`` (pixels), ``mean`` and ``std`` (per RGB channel, of images in [0, 1]).
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.config = dict(config)
        channels, groups = config["channels"], config["groups"]
        layers: list[nn.Module] = []
        before = 3
        for width in channels:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), _Block(width, groups)]
            before = width
        self.body = nn.Sequential(*layers, nn.GroupNorm(groups, before), nn.SiLU())
        # A layer after pooling: how far nuclei agree in direction is the length of a pooled vector, which no linear map
        # gives.
        self.head = nn.Sequential(nn.Linear(2 * before, 128), nn.SiLU(), nn.Linear(128, config["dim"]))

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, dim] of normalised images [N, 3, H, W]."""
        return self.read_out(self.body(x))

    def read_out(self, maps: Tensor) -> Tensor:
        """Features [N, dim] of the body's maps [N, C, h, w]."""
        maps = maps.flatten(2)
        return self.head(torch.cat([maps.mean(2), maps.std(2)], 1))

    @classmethod
    def load(cls, folder: str | Path) -> TinyEncoder:
        """Load from a folder with ``encoder.json`` and ``encoder.safetensors``; strict; returned in evaluation mode and
        float32.

        Raises:
            UserError: A file is missing or the tensors do not fit the configuration.
        """
        folder = Path(folder)
        verify_checksums(folder, "Copy the whole folder again.")
        encoder = cls(read_object(folder / "encoder.json"))
        weights = folder / "encoder.safetensors"
        if not weights.is_file():
            raise UserError(
                f"{weights} does not exist.", "An encoder folder holds encoder.json and encoder.safetensors."
            )
        try:
            encoder.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
        except RuntimeError as error:
            raise UserError(f"{weights} does not fit {folder / 'encoder.json'}: {error}") from None
        return encoder.eval()

    def save(self, folder: str | Path) -> None:
        """Write ``encoder.json`` and ``encoder.safetensors`` (float16, whose rounding hardly changes features)."""
        folder = Path(folder)
        with atomic_path(folder / "encoder.safetensors") as temporary:
            save_file({k: v.detach().half().contiguous() for k, v in self.state_dict().items()}, temporary)
        write_json(folder / "encoder.json", self.config)
        write_checksums(folder, ["encoder.json", "encoder.safetensors"])
