"""What encoding will write and which weights it needs, known before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from latent_medi.core.hub import Weights, in_hub_cache, is_hub_id
from latent_medi.core.tensor_files import tensor_file_bytes
from latent_medi.latents.autoencoder import HUB_NAMES, WEIGHTS_FILE, Autoencoder, load_autoencoder

_HUB_FACTS = {"sd-vae-ft-mse": (4, 8, False), "taesd": (4, 8, True)}
"""Channels, pixels per latent pixel and whether there is no deviation, of autoencoders that need not be here."""


@dataclass(frozen=True)
class LatentKind:
    """What an autoencoder's latents are.

    Args:
        channels: Of a latent.
        factor: Pixels per latent pixel along an edge.
        deterministic: Whether there is no standard deviation to store.
    """

    channels: int
    factor: int
    deterministic: bool

    def shape(self, patch_size: int) -> tuple[int, int, int]:
        """Shape (C, h, w) of the latent of a patch."""
        return self.channels, patch_size // self.factor, patch_size // self.factor


def autoencoder_weights(name: str) -> Weights:
    """Where an autoencoder's weights are from, and whether they are on this machine."""
    if name == "demo" or (Path(name).is_dir() and name not in HUB_NAMES):
        return Weights(name, "", True)
    hub_id = HUB_NAMES.get(name, name)
    if not is_hub_id(hub_id):
        return Weights(name, "", False, "Give a folder, a hub id owner/name, or a known name.")
    found = in_hub_cache(hub_id, [WEIGHTS_FILE])
    return Weights(name, hub_id, found, f"`hf download {hub_id} config.json {WEIGHTS_FILE}` fetches it.")


def open_autoencoder(name: str) -> Autoencoder | None:
    """The autoencoder, if that takes no download.

    Raises:
        UserError: It is here and cannot be loaded.
    """
    return load_autoencoder(name) if autoencoder_weights(name).found else None


def latent_kind(name: str, autoencoder: Autoencoder | None) -> LatentKind | None:
    """What the latents of an autoencoder are; ``None`` where only its files would tell and these are not here.

    Args:
        name: As the settings name it.
        autoencoder: The autoencoder itself, if it is here.
    """
    if autoencoder is not None:
        return LatentKind(autoencoder.latent_channels, autoencoder.factor, autoencoder.deterministic)
    return LatentKind(*_HUB_FACTS[name]) if name in _HUB_FACTS else None


def latents_bytes(kind: LatentKind, patch_size: int, counts: Sequence[int], views: int = 1) -> int:
    """Bytes of the tensor files of a latent folder, exactly; ``latents.json`` has about 500 bytes per shard more.

    Args:
        kind: Of the latents.
        patch_size: Edge of a patch in pixels.
        counts: Patches of each shard.
        views: 1 or 8.
    """
    names = ("mean",) if kind.deterministic else ("mean", "std")
    shape = (*((views,) if views > 1 else ()), *kind.shape(patch_size))
    return sum(tensor_file_bytes((name, "F16", (count, *shape)) for name in names) for count in counts)
