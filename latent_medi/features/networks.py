"""The networks behind the encoders: how each is built, loaded strictly, and read out.

Every builder returns a :class:`Network`: a module from normalised images to features, with the preprocessing it was
trained with. Nothing is downloaded here except through the Hugging Face hub's own client, and no pickle with code is
run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latent_medi.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """What happens between stored bytes and the network.

    Args:
        size: Side of the network's input in pixels; 0 keeps the patch's own.
        mean, std: Per-channel normalisation of images in [0, 1].
        resize: "bilinear" or "bicubic", both antialiased.
        channel: "rgb", or "haematoxylin" repeated three times.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "bilinear"
    channel: str = "rgb"

    @property
    def text(self) -> str:
        """One line that changes whenever a pixel could."""
        return f"uint8/255 -> {self.channel} -> {self.resize} antialiased {self.size} -> ({self.mean}, {self.std})"


@dataclass(frozen=True)
class Network:
    """A module with its readout dimension, preprocessing and licence."""

    name: str
    module: nn.Module
    dim: int
    preprocessing: Preprocessing
    license: str


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state dict from .safetensors or from a PyTorch file that holds nothing but tensors.

    Raises:
        UserError: The file is absent or cannot be read that way.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"The weights {path} do not exist.", "Check the path.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions for the same fact: the file is not what it claims
        raise UserError(f"The weights {path} cannot be read: {type(error).__name__}: {error}") from None
    return state.get("state_dict", state) if isinstance(state, dict) else state


def _find(weights: str | Path, patterns: tuple[str, ...]) -> Path:
    """The weight file itself, or the first file in the folder that fits a pattern."""
    path = Path(weights)
    if path.is_dir():
        found = [p for pattern in patterns for p in sorted(path.glob(pattern))]
        if not found:
            raise UserError(f"{path} holds no weight file.", f"Expected {' or '.join(patterns)}.")
        return found[0]
    return path


def _load_strictly(module: nn.Module, weights: Path) -> None:
    try:
        module.load_state_dict(read_weights(weights), strict=True)
    except RuntimeError as error:
        raise UserError(f"{weights} does not fit the network: {error}") from None


class _MeanPooled(nn.Module):
    """Mean over positions of a convolutional map."""

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean(dim=(2, 3))


class _ClassToken(nn.Module):
    """First token of a transformers vision model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).last_hidden_state[:, 0]


class _Inception(nn.Module):
    """torch-fidelity's Inception, which resizes and scales 8-bit images itself."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, x: Tensor) -> Tensor:
        return self.extractor((x * 255.0).round().clamp(0, 255).to(torch.uint8))[0]


def squeezenet(weights: str | Path | None, size: int = 224) -> Network:
    """ImageNet SqueezeNet 1.0, last feature map mean-pooled (512-d); its distance is FD-SqueezeNet, never FID."""
    from torchvision.models import squeezenet1_0

    if not weights:
        raise UserError(
            "The encoder 'squeezenet' needs its weights.",
            "Give weights=PATH: a state dict of torchvision's squeezenet1_0 (.safetensors, .pth) or a folder with one.",
        )
    model = squeezenet1_0(weights=None)
    _load_strictly(model, _find(weights, ("squeezenet1_0*.safetensors", "squeezenet1_0*.pth", "*.safetensors")))
    preprocessing = Preprocessing(size, IMAGENET_MEAN, IMAGENET_STD)
    return Network("squeezenet", _MeanPooled(model.features), 512, preprocessing, "BSD-2-Clause")


def inception(weights: str | Path | None) -> Network:
    """The Inception of FID as torch-fidelity ports it (2048-d); the only encoder whose distance is called FID."""
    if not weights:
        raise UserError(
            "The encoder 'inception' needs its weights.",
            "Give weights=PATH to torch-fidelity's weights-inception-2015-12-05 file.",
        )
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = _find(weights, ("*inception*.pth", "*.pth"))
    # torch-fidelity unpickles freely; a file that passes the restricted reader first holds only tensors.
    read_weights(path)
    extractor = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    return Network("inception", _Inception(extractor), 2048, Preprocessing(0, (0.0,) * 3, (1.0,) * 3), "Apache-2.0")


def uni(weights: str | Path | None) -> Network:
    """UNI (ViT-L/16, 1024-d) through timm, from a local checkpoint or, with access granted, the hub."""
    import timm

    shape: dict[str, Any] = {"init_values": 1e-5, "dynamic_img_size": True, "num_classes": 0}
    if weights:
        model = timm.create_model("vit_large_patch16_224", img_size=224, patch_size=16, pretrained=False, **shape)
        _load_strictly(model, _find(weights, ("*.safetensors", "pytorch_model.bin")))
    else:
        model = _from_hub(
            lambda: timm.create_model("hf-hub:MahmoodLab/uni", pretrained=True, **shape), "uni", "MahmoodLab/uni"
        )
    return Network("uni", model, 1024, Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "bicubic"), "CC-BY-NC-ND-4.0")


def phikon_v2(weights: str | Path | None) -> Network:
    """Phikon-v2 (DINOv2 ViT-L, class token, 1024-d) through transformers, from a local folder or the hub."""
    from transformers import Dinov2Model

    source = str(weights) if weights else "owkin/phikon-v2"
    model = _from_hub(lambda: Dinov2Model.from_pretrained(source), "phikon-v2", "owkin/phikon-v2")
    preprocessing = Preprocessing(224, IMAGENET_MEAN, IMAGENET_STD, "bicubic")
    return Network(
        "phikon-v2", _ClassToken(model), int(model.config.hidden_size), preprocessing, "Owkin non-commercial"
    )


def tiny(folder: str | Path, name: str) -> Network:
    """A :class:`~latent_medi.features.tiny.TinyEncoder` from its folder."""
    from latent_medi.features.tiny import TinyEncoder

    if not Path(folder).is_dir():
        raise UserError(
            f"The encoder folder {folder} does not exist.", "It holds encoder.json and encoder.safetensors."
        )
    model = TinyEncoder.load(folder)
    config = model.config
    preprocessing = Preprocessing(int(config["image_size"]), tuple(config["mean"]), tuple(config["std"]))
    return Network(name, model, int(config["dim"]), preprocessing, config.get("license", "same as latent-medi"))


def _from_hub(load: Callable[[], Any], name: str, repository: str) -> Any:
    """Load through a hub client; a refusal or a missing connection becomes one instruction."""
    try:
        return load()
    except (OSError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The encoder {name!r} cannot be loaded: {first}",
            f"Accept its licence at huggingface.co/{repository} and log in with `hf auth login`, or download it and "
            "give weights=PATH.",
        ) from None


def resized(network: Network, size: int) -> Network:
    """The same network fed at another input size."""
    return replace(network, name=f"{network.name}@{size}", preprocessing=replace(network.preprocessing, size=size))
