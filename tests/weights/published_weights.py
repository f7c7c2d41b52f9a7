"""Published weights, where to get them, and properties of what they make that no other weights have.

On patches of :func:`real_biopsies` SqueezeNet's own weights find 58 % of the changed patches again, random ones 6 to
15 %, and the mean and deviation of the colours 6 %. On those of :func:`real_colon` TAEF2 reconstructs at 34.7 dB, and a
picture of an eighth of the size enlarged again has 25.0 dB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from latent_medi.core.files import sha256_file
from latent_medi.features.encoders import ImageEncoder
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.statistics.distances import frechet_distance

LEAST_PSNR, LEAST_GAIN = 25.0, 1.0
"""Decibels in all, and more than a picture of an eighth of the size enlarged again."""
LEAST_FOUND = 0.4
LEAST_NEIGHBOURS = 0.2
"""Chance is 0.06 with four patches of each of twelve slides."""


@dataclass(frozen=True)
class Published:
    """A published network.

    Args:
        name: Its folder, and its name in settings.
        file: Its weights in that folder.
        source: Where to download them.
        sha256: Of the published file; "" where none was published.
        also: Further files of the folder.
    """

    name: str
    file: str
    source: str
    sha256: str = ""
    also: tuple[str, ...] = ()

    def how(self, folder: Path) -> str:
        """What to do to have it tested."""
        return f"{self.name}: put {', '.join((self.file, *self.also))} of {self.source} into {folder / self.name}"

    def check_file(self, folder: Path) -> None:
        """Compare the hash of the file with the published one."""
        if self.sha256:
            found = sha256_file(folder / self.name / self.file)
            assert found == self.sha256, f"{folder / self.name / self.file} is not the file of {self.source}: {found}"


_VAE, _TAEF2 = "diffusion_pytorch_model.safetensors", ("taef2_encoder.pth", "taef2_decoder.pth")
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"

AUTOENCODERS = (
    Published(
        "sd-vae-ft-mse",
        _VAE,
        "https://huggingface.co/stabilityai/sd-vae-ft-mse",
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
        ("config.json",),
    ),
    Published("taef2", _TAEF2[0], "https://github.com/madebyollin/taesd", also=(_TAEF2[1],)),
)

ENCODERS = (
    Published(
        "uni",
        "pytorch_model.bin",
        "https://huggingface.co/MahmoodLab/UNI (accept its licence there)",
        "56ef09b44a25dc5c7eedc55551b3d47bcd17659a7a33837cf9abc9ec4e2ffb40",
    ),
    Published(
        "phikon-v2",
        "model.safetensors",
        "https://huggingface.co/owkin/phikon-v2",
        "261ae680fa699b3b951597fd57aa19c02ef735805acb104b93af69b36d928569",
        ("config.json",),
    ),
    Published(
        "inception",
        _INCEPTION,
        "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    ),
    Published("squeezenet", "squeezenet1_0_imagenet.safetensors", "torchvision's squeezenet1_0 (as safetensors)"),
)


def real_biopsies(shared: Path, slides: int = 12, each: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Patches of real biopsies, uint8 [n, 256, 256, 3], and the slide of each."""
    root = shared / "data" / "prostate"
    table = pd.read_csv(root / "manifest.csv", dtype=str, keep_default_na=False)
    largest = table["patient"].value_counts().index[:slides]
    of_slides = [table[table["patient"] == slide] for slide in largest]
    chosen = pd.concat([rows.iloc[np.linspace(0, len(rows) - 1, each).astype(int)] for rows in of_slides])
    images = np.stack([np.asarray(Image.open(root / name).convert("RGB")) for name in chosen["image"]])
    return images, chosen["patient"].to_numpy()


def real_colon(shared: Path, count: int = 8) -> np.ndarray:
    """Patches of colorectal carcinoma, uint8 [count, 256, 256, 3]."""
    files = sorted((shared / "data" / "unlabelled" / "consep").rglob("*.jp*g"))
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in files[:: len(files) // count][:count]])


def stained_otherwise(patches: np.ndarray) -> np.ndarray:
    """The patches turned by 90°, with another gain and offset in each colour of each patch."""
    random = np.random.default_rng(0)
    gain, offset = (random.uniform(a, b, (len(patches), 1, 1, 3)) for a, b in ((0.7, 1.3), (-25, 25)))
    return np.clip(np.rot90(patches, 1, (1, 2)) * gain + offset, 0, 255).astype(np.uint8)


def decibels(patches: np.ndarray, others: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio of patches, uint8 [n, H, W, 3]."""
    error = ((others.astype(float) - patches) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / error)).mean())


def check_reconstruction(autoencoder: Autoencoder, patches: np.ndarray) -> None:
    """Patches come back better than :data:`LEAST_PSNR` and than :data:`LEAST_GAIN` over an enlarged small picture."""
    made = np.concatenate([autoencoder.decode(autoencoder.encode(patch[None])[0]) for patch in patches])
    small = [Image.fromarray(patch).resize((32, 32), Image.Resampling.BOX) for patch in patches]
    blurred = np.stack([np.asarray(picture.resize((256, 256), Image.Resampling.BICUBIC)) for picture in small])
    found, least = decibels(patches, made), max(LEAST_PSNR, decibels(patches, blurred) + LEAST_GAIN)
    assert found >= least, f"{autoencoder.source} reconstructs real patches at {found:.1f} dB, not {least:.1f}"


def features_of(encoder: ImageEncoder, patches: np.ndarray) -> np.ndarray:
    """Features of patches, float32 [n, d]."""
    return encoder.features([patches[start : start + 8] for start in range(0, len(patches), 8)])


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of features around their common mean, [n, m]."""
    mean = np.concatenate([a, b]).mean(0)
    a, b = ((x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True) for x in (a, b))
    return a @ b.T


def check_found_again(name: str, features: np.ndarray, changed: np.ndarray) -> None:
    """A patch that is turned and stained otherwise is mostly the nearest to itself."""
    found = float((cosines(features, changed).argmax(1) == np.arange(len(features))).mean())
    assert found >= LEAST_FOUND, f"{name} finds {found:.0%} of the patches again that are turned and stained otherwise"


def check_neighbours(name: str, features: np.ndarray, slides: np.ndarray) -> None:
    """The nearest other patch is often one of the same slide."""
    near = cosines(features, features)
    np.fill_diagonal(near, -2)
    share = float((slides[near.argmax(1)] == slides).mean())
    assert share >= LEAST_NEIGHBOURS, f"{name}: the nearest patch is one of the same slide for {share:.0%}"


def check_zero(name: str, features: np.ndarray) -> None:
    """The Fréchet distance of patches to themselves is 0 but for rounding, and not 0 to others."""
    half = len(features) // 2
    scale = frechet_distance(features[:half], features[half:])
    assert scale > 0
    assert abs(frechet_distance(features, features)) <= 1e-3 * scale, name
