"""The perceptual distance: reconstructions and patches compared in the features of a frozen network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from latent_medi.autoencoder.settings import PerceptualSettings
from latent_medi.core.errors import UserError, needs
from latent_medi.features.encoders import load_encoder
from latent_medi.features.networks import find_weights, read_weights
from latent_medi.features.registry import ENCODERS, IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from latent_medi.latents.networks import weight_hash

SQUEEZENET_LAYERS = (1, 5, 10, 12)
"""Ends of the parts of torchvision's squeezenet1_0.features whose maps are compared: the last before each
halving of the size, and the last."""


class PerceptualDistance:
    """A distance of images in several layers of a frozen network.

    At every layer and position, the vector of channels is scaled to length 1; the squared differences are summed over
    channels, averaged over positions and over layers (Zhang et al. 2018, arXiv 1801.03924, equation 1, with all weights
    1 / layers). Between 0 and 4.

    Args:
        layers: From normalised images [n, 3, H, W] to maps [n, C, h, w] or vectors [n, C].
        module: The network, frozen.
        preprocessing: Its normalisation, and its size if it takes one alone.
        identity: Distinguishes it from others, for the record of a run.
    """

    def __init__(
        self,
        layers: Callable[[torch.Tensor], list[torch.Tensor]],
        module: nn.Module,
        preprocessing: Preprocessing,
        identity: str,
    ) -> None:
        self.module, self.identity, self._layers, self._how = module, identity, layers, preprocessing
        self.module.eval().requires_grad_(False)
        self._mean, self._std = (torch.tensor(v).view(-1, 1, 1) for v in (preprocessing.mean, preprocessing.std))

    def to(self, device: torch.device) -> PerceptualDistance:
        """Move it to a device."""
        self.module.to(device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        return self

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        size = self._how.size
        if size and tuple(x.shape[2:]) != (size, size):
            x = F.interpolate(x, size=(size, size), mode=self._how.resize, align_corners=False, antialias=True)
        return [F.normalize(found.float(), dim=1) for found in self._layers((x - self._mean) / self._std)]

    def __call__(self, x: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        """Distances fp32 [n] of images [n, 3, H, W] in [0, 1] to ``others``; differentiable in ``x``."""
        with torch.no_grad():
            theirs = self._maps(others)
        maps = zip(self._maps(x), theirs, strict=True)
        return torch.stack([(a - b).square().sum(1).reshape(len(x), -1).mean(1) for a, b in maps]).mean(0)


def load_perceptual(settings: PerceptualSettings) -> PerceptualDistance:
    """The perceptual distance of the settings.

    Raises:
        UserError: There is no such network, or its weights are absent or do not fit.
    """
    name, weights = settings.network, settings.weights or None
    if name == "squeezenet":
        encoder = load_encoder(name, weights)
        features: Any = encoder.module.features
        preprocessing = Preprocessing(0, IMAGENET_MEAN, IMAGENET_STD)
        return PerceptualDistance(lambda x: _after(features, x), features, preprocessing, encoder.fingerprint)
    if name not in ENCODERS and not Path(name).is_dir() and ":" not in name and _in_timm(name):
        return _of_timm(name, weights)
    encoder = load_encoder(name, weights)
    module = encoder.module
    return PerceptualDistance(lambda x: [module(x)], module, encoder.preprocessing, encoder.fingerprint)


def _after(features: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The maps at the ends of the parts of SqueezeNet."""
    found = []
    for number, layer in enumerate(features):
        x = layer(x)
        if number in SQUEEZENET_LAYERS:
            found.append(x)
    return found


def _load(module: nn.Module, file: Path, name: str) -> None:
    """Load the weights of a network's stages; a file of the whole network holds more.

    Raises:
        UserError: A tensor is absent or has another shape.
    """
    stored = read_weights(file)
    for key, tensor in module.state_dict().items():
        if key not in stored or stored[key].shape != tensor.shape:
            found = list(stored[key].shape) if key in stored else "absent"
            raise UserError(f"{file} does not fit the network {name}: {key} is {found}, not {list(tensor.shape)}.")
    module.load_state_dict(stored, strict=False)


def _in_timm(name: str) -> bool:
    with needs("The perceptual term", "timm"):
        import timm
    return bool(timm.is_model(name))


def _of_timm(name: str, weights: str | None) -> PerceptualDistance:
    """The stages of a network of timm, with the weights of a file, or of the hub or its cache."""
    import timm

    try:
        module: Any = timm.create_model(name, features_only=True, pretrained=weights is None)
    except (RuntimeError, OSError, AttributeError) as error:
        raise UserError(
            f"The network {name} of timm cannot be used: {str(error).splitlines()[0]}",
            "Give its weights in perceptual.weights, or choose another network.",
        ) from None
    if weights is not None:
        file = find_weights(weights, ("*.safetensors", "*.pth", "*.bin"))
        _load(module, file, name)
    mean, std = (tuple(module.pretrained_cfg[key]) for key in ("mean", "std"))
    return PerceptualDistance(module, module, Preprocessing(0, mean, std), weight_hash(module))
