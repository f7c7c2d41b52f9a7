"""Image encoders behind one preprocessing path, the same for real and for synthetic patches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import latent_medi
from latent_medi.core.device import check_precision, exact_fp32
from latent_medi.core.errors import UserError, nearest
from latent_medi.features import networks
from latent_medi.features.classifier_folder import CLASSIFIER_FILE, classifier_encoder
from latent_medi.features.networks import Network
from latent_medi.features.registry import ENCODERS
from latent_medi.features.stain import haematoxylin
from latent_medi.features.transformer import vision_transformer
from latent_medi.features.user_encoders import CONTRACT, own_network

COLOUR_FREE_SUFFIX = ":haematoxylin"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precisions of a network's arithmetic, with the autocast type."""
KNOWN = tuple(ENCODERS)
DEMO_FOLDER = Path(latent_medi.__file__).parent / "demo" / "weights" / "encoder"


class ImageEncoder:
    """A frozen network from 8-bit patches to feature vectors.

    uint8 → [0, 1] → haematoxylin, if colour-free → antialiased resize → normalise → network → float32.

    Args:
        network: The module with its preprocessing.
        device: Torch device.
        precision: Arithmetic inside the network, one of :data:`PRECISIONS`; pre- and postprocessing are fp32.
    """

    def __init__(self, network: Network, device: str | torch.device = "cpu", precision: str = "fp32") -> None:
        self.network, self.precision = network, precision
        self.module = network.module.eval().requires_grad_(False)
        self._place(torch.device(device))
        self.name = network.name
        self.dim = network.dim
        self.license = network.license
        self.preprocessing = network.preprocessing
        self._weights_hash = ""

    def _place(self, device: torch.device) -> None:
        check_precision(self.precision, device)
        how = self.network.preprocessing
        self.device = device
        with torch.inference_mode(False):
            self.module.to(device)
            # Copied once: copied with every batch, they would wait for the GPU each time.
            self._mean, self._std = (
                torch.tensor(v, dtype=torch.float32, device=device)[:, None, None] for v in (how.mean, how.std)
            )

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the weights, the network's class, preprocessing and readout, and a precision below fp32."""
        if not self._weights_hash:
            digest = hashlib.sha256(type(self.module).__qualname__.encode())
            for key, value in sorted(self.module.state_dict().items()):
                digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
                digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
            self._weights_hash = digest.hexdigest()
        parts = [self._weights_hash, self.preprocessing.text, *filter(None, [self.network.readout])]
        parts += [self.precision] if self.precision != "fp32" else []
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def prepare(self, images: np.ndarray) -> Tensor:
        """Network input [n, 3, S, S], float32, of uint8 patches [n, H, W, 3].

        Raises:
            UserError: The array has another shape or type.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise UserError(f"Patches must be uint8 [n, H, W, 3], not {images.dtype} {list(images.shape)}.")
        # Copied, since arrays read from an archive may be read-only and torch warns about those.
        x = torch.from_numpy(np.array(images))
        if self.device.type == "cuda" and torch.cuda.is_available():
            x = x.pin_memory()  # a copy from other memory would wait for the GPU
        x = x.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255.0
        how = self.preprocessing
        if how.channel == "haematoxylin":
            x = haematoxylin(x).expand(-1, 3, -1, -1)
        if how.size and tuple(x.shape[2:]) != (how.size, how.size):
            x = F.interpolate(x, size=(how.size, how.size), mode=how.resize, align_corners=False, antialias=True)
            x = x.clamp(0.0, 1.0)  # bicubic overshoots
        return (x - self._mean) / self._std

    def _forward(self, batch: np.ndarray) -> Tensor:
        x, dtype = self.prepare(batch), PRECISIONS[self.precision]
        with torch.autocast(self.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            result = self.module(x)
        if not isinstance(result, Tensor) or tuple(result.shape) != (len(batch), self.dim):
            found = list(result.shape) if isinstance(result, Tensor) else f"a {type(result).__name__}"
            raise UserError(
                f"The encoder {self.name} returned {found} for {len(batch)} patches, not [{len(batch)}, {self.dim}].",
                CONTRACT,
            )
        return result.float()

    @torch.inference_mode()
    @exact_fp32()
    def features(self, batches: Iterable[np.ndarray], device: str | torch.device | None = None) -> np.ndarray:
        """Feature vectors of batches of uint8 patches [n, H, W, 3].

        Args:
            batches: Patches; batches may differ in n.
            device: Move the network there first.

        Returns:
            float32 [N, d].

        Raises:
            UserError: The network does not return [n, d], or a feature is not finite in a precision below fp32.
            ValueError: A feature is not finite.
        """
        if device is not None and torch.device(device) != self.device:
            self._place(torch.device(device))
        parts: list[np.ndarray] = []
        before: Tensor | None = None
        for batch in batches:
            found = self._forward(batch) if len(batch) else None
            # Fetched once the next batch is running, so that the GPU need not wait for it to be read.
            if before is not None:
                parts.append(before.cpu().numpy())
            before = found
        if before is not None:
            parts.append(before.cpu().numpy())
        result = np.concatenate(parts) if parts else np.zeros((0, self.dim), np.float32)
        if not np.isfinite(result).all():
            if self.precision != "fp32":
                raise UserError(
                    f"The encoder {self.name} returned features that are not finite in {self.precision}.",
                    f"Leave out '@{self.precision}'.",
                )
            raise ValueError(f"the encoder {self.name} returned features that are not finite")
        return result


def load_encoder(
    name_or_folder: str | Path, weights: str | Path | None = None, device: str | torch.device = "cpu"
) -> ImageEncoder:
    """Load an encoder by name, from a folder with ``encoder.json`` and ``encoder.safetensors``, or from a function.

    The folder of an image classifier gives its features before the last layer.

    Args:
        name_or_folder: One of ``KNOWN``, perhaps with an input size ("squeezenet@128") and a precision below fp32
            ("phikon-v2@bf16", "squeezenet@128@bf16"); a folder; or ``module:callable``, see
            :data:`latent_medi.features.user_encoders.CONTRACT`.
        weights: Weight file or folder, for encoders that do not ship with the package. Without it those of the Hugging
            Face hub are downloaded, or taken from its client's cache.
        device: Torch device.

    Raises:
        UserError: Unknown name, missing weights (with what to do to get them), or weights that do not fit.
    """
    text = str(name_or_folder)
    name, *marks = text.split("@")
    precision = marks.pop() if marks and marks[-1] in PRECISIONS else "fp32"
    size = "@".join(marks)
    if name not in ENCODERS and (Path(text) / CLASSIFIER_FILE).is_file():
        return ImageEncoder(classifier_encoder(text), device)
    if name not in ENCODERS and Path(text).is_dir():
        return ImageEncoder(networks.tiny(text, Path(text).name), device)
    if name not in ENCODERS and ":" in text:
        encoder = ImageEncoder(own_network(text, weights), device)
        if pixels := encoder.preprocessing.size:  # refuses a wrong network now
            encoder.features([np.zeros((2, pixels, pixels, 3), np.uint8)])
        return encoder
    if name not in ENCODERS:
        raise UserError(
            f"There is no encoder {text!r}.",
            f"Give a name, a folder with encoder.json, or module:callable; {nearest(name, KNOWN)}.",
        )
    if size and not (size.isdigit() and int(size) >= 32):
        raise UserError(
            f"The input size in {text!r} must be a number of pixels, 32 or more.",
            "A precision follows another '@', such as squeezenet@128@bf16.",
        )
    entry = ENCODERS[name]
    if size and not entry.resizable:
        raise UserError(f"The encoder {name!r} has one input size; leave out '@{size}'.")
    if size and int(size) % (patch := entry.arguments.get("patch_size", 1)):
        raise UserError(f"The input size in {text!r} must be a multiple of {patch}, the side of the encoder's tokens.")
    if entry.library == "package":
        network = networks.tiny(weights or DEMO_FOLDER, name)
    elif entry.library == "torchvision":
        network = networks.squeezenet(weights)
    elif entry.library == "torch-fidelity":
        network = networks.inception(weights)
    else:
        network = vision_transformer(name, weights)
    network = networks.resized(network, int(size)) if size else network
    if precision != "fp32":
        network = replace(network, name=f"{network.name}@{precision}")  # its features differ from those of fp32
    return ImageEncoder(network, device, precision)


def colour_free(encoder: ImageEncoder) -> ImageEncoder:
    """The same network on the haematoxylin channel alone, so that eosin and tint cannot identify a site."""
    twin = replace(
        encoder.network,
        name=encoder.name + COLOUR_FREE_SUFFIX,
        preprocessing=replace(encoder.preprocessing, channel="haematoxylin"),
    )
    result = ImageEncoder(twin, encoder.device, encoder.precision)
    result._weights_hash = encoder._weights_hash
    return result
