"""The networks behind the encoders: strict loading, and the convolutional ones.

Every builder returns a :class:`Network`: a module from normalised images to features, with the preprocessing it was
trained with. Nothing is downloaded except through the Hugging Face hub's own client, and no pickle with code is run.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from latent_medi.core.errors import UserError, needs
from latent_medi.features.registry import ENCODERS, Preprocessing


@dataclass(frozen=True)
class Network:
    """A module with its readout dimension, preprocessing and licence.

    Args:
        name: Its name in records.
        module: From normalised images [n, 3, S, S], float32, to features [n, dim].
        dim: Features per patch.
        preprocessing: The preprocessing that it was trained with.
        license: Licence of the weights.
        readout: Text that differs if features differ for another reason than weights, class and preprocessing; part of
            the fingerprint.
    """

    name: str
    module: nn.Module
    dim: int
    preprocessing: Preprocessing
    license: str
    readout: str = ""


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
    except Exception as error:  # each format has its own exceptions for a damaged file
        raise UserError(f"The weights {path} cannot be read: {type(error).__name__}: {error}") from None
    return state.get("state_dict", state) if isinstance(state, dict) else state


_SQUEEZENET_SIZE = 15.0
"""Root mean square of its pooled activations in H&E patches at 224 px (colon, mouth, prostate, TCGA: 14 to 16.5). The
kernel of KID, (x·y/d + 1)³, is made for features whose root mean square is about 1, as that of other encoders is."""


def find_weights(weights: str | Path, patterns: tuple[str, ...]) -> Path:
    """The weight file itself, or the first file of the folder that matches a pattern.

    Raises:
        UserError: No file of the folder fits.
    """
    path = Path(weights)
    if path.is_dir():
        found = [p for pattern in patterns for p in sorted(path.glob(pattern))]
        if not found:
            raise UserError(f"{path} holds no weight file.", f"Expected {' or '.join(patterns)}.")
        return found[0]
    return path


def load_strictly(module: nn.Module, weights: Path, assign: bool = False) -> None:
    """Load a state dict; missing and unexpected tensors and other shapes are refused.

    Args:
        module: The module to load into.
        weights: The file.
        assign: Replace the module's tensors by the file's; the module may then be on torch's "meta" device.

    Raises:
        UserError: See :func:`read_weights`, or a tensor does not fit.
    """
    try:
        module.load_state_dict(read_weights(weights), strict=True, assign=assign)
    except RuntimeError as error:
        raise UserError(f"{weights} does not fit the network: {error}") from None


def weight_file(name: str, weights: str | Path | None) -> str | Path:
    """The given weights of an encoder, else its file in torch's cache, where torchvision, torch-fidelity and
    torchmetrics put it.

    Raises:
        UserError: It is not there; says where it is downloaded.
    """
    entry = ENCODERS[name]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / entry.source
    if not weights and not cached.is_file():
        raise UserError(
            f"The encoder {name!r} needs its weights.",
            f"Download {entry.url} and give weights.{name}=PATH (`select`: weights=PATH), or put it at {cached}.",
        )
    return weights or cached


class _MeanPooled(nn.Module):
    """Mean over positions of a convolutional map, divided by a constant, which is a part of the fingerprint."""

    def __init__(self, features: nn.Module, divisor: float) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("divisor", torch.tensor(divisor))

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean(dim=(2, 3)) / self.divisor


class _Inception(nn.Module):
    """torch-fidelity's Inception, which resizes and scales 8-bit images itself."""

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def forward(self, x: Tensor) -> Tensor:
        return self.extractor((x * 255.0).round().clamp(0, 255).to(torch.uint8))[0]


def squeezenet(weights: str | Path | None) -> Network:
    """ImageNet SqueezeNet 1.0, last feature map mean-pooled and divided by 15 (512-d); its distance is FD-SqueezeNet,
    never FID.
    """
    from torchvision.models import squeezenet1_0

    entry, path = ENCODERS["squeezenet"], weight_file("squeezenet", weights)
    model = squeezenet1_0(weights=None)
    load_strictly(model, find_weights(path, ("squeezenet1_0*.safetensors", "squeezenet1_0*.pth", "*.safetensors")))
    assert entry.preprocessing is not None
    return Network(
        "squeezenet", _MeanPooled(model.features, _SQUEEZENET_SIZE), entry.dim, entry.preprocessing, entry.license
    )


def inception(weights: str | Path | None) -> Network:
    """The Inception of FID as torch-fidelity ports it (2048-d); the only encoder whose distance is called FID."""
    entry = ENCODERS["inception"]
    path = find_weights(weight_file("inception", weights), ("*inception*.pth", "*.pth"))
    # torch-fidelity unpickles without restriction; the restricted reader makes sure that there are only tensors.
    read_weights(path)
    with needs("The encoder 'inception'", "torch-fidelity"):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        extractor = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the network: {error}") from None
    assert entry.preprocessing is not None
    return Network("inception", _Inception(extractor), entry.dim, entry.preprocessing, entry.license)


def tiny(folder: str | Path, name: str) -> Network:
    """A :class:`~latent_medi.features.tiny_encoder.TinyEncoder` from its folder."""
    from latent_medi.features.tiny_encoder import TinyEncoder

    if not Path(folder).is_dir():
        raise UserError(
            f"The encoder folder {folder} does not exist.", "It holds encoder.json and encoder.safetensors."
        )
    model = TinyEncoder.load(folder)
    config = model.config
    preprocessing = Preprocessing(int(config["image_size"]), tuple(config["mean"]), tuple(config["std"]))
    license = config.get("license", "same as latent-medi")
    # The configuration is part of the readout, since no tensor holds the number of groups.
    return Network(name, model, int(config["dim"]), preprocessing, license, json.dumps(config, sort_keys=True))


def resized(network: Network, size: int) -> Network:
    """The same network with another input size."""
    return replace(network, name=f"{network.name}@{size}", preprocessing=replace(network.preprocessing, size=size))
