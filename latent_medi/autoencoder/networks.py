"""The networks that are trained along: the auxiliary classifier and the discriminator; and new autoencoders."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from latent_medi.autoencoder.settings import NewNetworkSettings
from latent_medi.core.errors import UserError, nearest, needs
from latent_medi.features.classifier_folder import read_classifier
from latent_medi.latents.taef2 import AutoencoderTAEF2

_MEAN, _STD = 0.5, 0.5  # normalisation of pixels in [0, 1] for networks that are trained along


def new_autoencoder(settings: NewNetworkSettings) -> nn.Module:
    """An autoencoder with random weights, drawn from torch's random state.

    Raises:
        UserError: Numbers that do not fit each other.
    """
    channels, layers = settings.channels, settings.layers
    if not channels:
        raise UserError(
            "network.channels lists no stage.", "The factor is 2 to the power of the stages after the first."
        )
    if settings.kind == "AutoencoderTAEF2":
        return AutoencoderTAEF2(settings.latent_channels, channels[0], layers)
    if settings.kind == "AutoencoderTiny":
        width = tuple(channels[:1] * len(channels))
        return AutoencoderTiny(
            encoder_block_out_channels=width,
            decoder_block_out_channels=width,
            num_encoder_blocks=(1, *(layers,) * (len(width) - 1)),
            num_decoder_blocks=(*(layers,) * (len(width) - 1), 1),
            latent_channels=settings.latent_channels,
        )
    if bad := [width for width in channels if width % settings.norm_groups]:
        raise UserError(f"network.norm_groups={settings.norm_groups} does not divide {bad[0]} of network.channels.")
    return AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        latent_channels=settings.latent_channels,
        layers_per_block=layers,
        norm_num_groups=settings.norm_groups,
    )


def encoder_parts(autoencoder: Any) -> list[nn.Module]:
    """The modules that latents depend on."""
    names = ("encoder", "quant_conv")
    return [part for name in names if isinstance(part := getattr(autoencoder, name, None), nn.Module)]


def last_layer(autoencoder: Any) -> torch.Tensor:
    """The weight of the decoder's last layer, at which the terms' gradients are compared."""
    convolutions = [m for m in autoencoder.decoder.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return convolutions[-1].weight


class Discriminator(nn.Module):
    """Logits of "real" for overlapping patches of an image (PatchGAN, Isola et al. 2017, arXiv 1611.07004).

    Group instead of batch normalisation, so that an image's logits do not depend on the others of its batch.

    Args:
        channels: Channels of the first layer.
        layers: Layers that halve the size.
    """

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        found: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        before = channels
        for number in range(1, layers + 1):
            width, stride = channels * min(2**number, 8), 2 if number < layers else 1
            norm = nn.GroupNorm(math.gcd(32, width), width)
            found += [nn.Conv2d(before, width, 4, stride, 1, bias=False), norm, nn.LeakyReLU(0.2)]
            before = width
        self.body = nn.Sequential(*found, nn.Conv2d(before, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, 1, h, w] of images [n, 3, H, W] in [0, 1]."""
        return self.body((x - _MEAN) / _STD)


class AuxiliaryClassifier(nn.Module):
    """A classifier of timm's with random weights and without batch statistics.

    Args:
        name: Name in timm.
        classes: Number of classes.
        size: Edge of the images in pixels.

    Raises:
        UserError: timm has no such network, or it needs batch normalisation.
    """

    def __init__(self, name: str, classes: int, size: int) -> None:
        super().__init__()
        with needs("The auxiliary classifier", "timm"):
            import timm
        if not timm.is_model(name):
            raise UserError(f"timm has no network {name!r}; {nearest(name, timm.list_models())}.")

        def make(**options: Any) -> nn.Module:
            try:
                return timm.create_model(name, num_classes=classes, img_size=size, **options)
            except TypeError:  # a network for every size does not take one
                return timm.create_model(name, num_classes=classes, **options)

        network = make()
        if _has_batch_statistics(network):
            with contextlib.suppress(TypeError, ValueError, RuntimeError):
                network = make(norm_layer=_group_norm)
        if _has_batch_statistics(network):
            raise UserError(
                f"The network {name} has batch normalisation, whose numbers would depend on device_batch.",
                "Choose another for classifier.network, such as resnet18 or vit_tiny_patch16_224.",
            )
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of images [n, 3, H, W] in [0, 1]."""
        return self.network((x - _MEAN) / _STD)


class TrainedClassifier(nn.Module):
    """An image classifier that stays as it is, in evaluation mode, from pixels in [0, 1].

    Args:
        folder: Of the classifier.

    Attributes:
        facts: What it predicts, and from what.

    Raises:
        UserError: It is no image classifier, or damaged.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.facts, self.network = read_classifier(folder)
        how = self.facts.preprocessing
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (how.mean, how.std))

    def train(self, mode: bool = True) -> TrainedClassifier:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [n, classes] of images [n, 3, H, W] in [0, 1]."""
        how = self.facts.preprocessing
        if tuple(x.shape[2:]) != (how.size, how.size):
            x = F.interpolate(x, size=(how.size, how.size), mode=how.resize, align_corners=False, antialias=True)
        return self.network((x - self._mean.to(x)) / self._std.to(x))


def _group_norm(channels: int, **_: Any) -> nn.Module:
    return nn.GroupNorm(math.gcd(32, channels), channels)


def _has_batch_statistics(network: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def held(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A module as a function whose gradient goes to its input alone, not to its weights."""
    weights = {name: tensor.detach() for name, tensor in module.state_dict(keep_vars=True).items()}
    return lambda x: functional_call(module, weights, (x,))
