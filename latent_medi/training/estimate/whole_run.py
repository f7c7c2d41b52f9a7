"""What a whole run takes besides the memory of its device: images, hours, files, and weights from elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from latent_medi.core.files import read_object
from latent_medi.core.hub import Weights, in_hub_cache, is_hub_id
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.features.needed import encoder_weights
from latent_medi.latents.info import INFO_FILE
from latent_medi.latents.size import autoencoder_weights, latent_kind, latents_bytes, open_autoencoder
from latent_medi.shards.dataset import PatchDataset
from latent_medi.training.estimate.disk import run_files
from latent_medi.training.settings import TrainSettings

NETWORK_FILES = ("unet/config.json", "config.json")
"""Configuration of a network in a repository of the hub: a whole model's, or the network's alone."""


def latents_to_come(settings: TrainSettings, dataset: PatchDataset) -> tuple[tuple[int, int, int], int] | None:
    """Shape (C, h, w) and bytes of the latents that a run's autoencoder will make of a dataset; ``None`` where neither
    the settings name one nor its files tell.
    """
    name = settings.autoencoder
    kind = latent_kind(name, open_autoencoder(name)) if name else None
    if kind is None:
        return None
    counts = [shard["count"] for shard in dataset.info["shards"]]
    stored = latents_bytes(kind, dataset.patch_size, counts) if settings.latents else 0
    return kind.shape(dataset.patch_size), stored


def init_weights(init_from: str) -> Weights | None:
    """The model to start from as weights of the hub; ``None`` for a folder or none."""
    if not is_hub_id(init_from) or Path(init_from).is_dir():
        return None
    remedy = f"`hf download {init_from} --include '*.json' '*.safetensors'` fetches it."
    return Weights(init_from, init_from, in_hub_cache(init_from, NETWORK_FILES), remedy)


def whole_run(settings: TrainSettings, denoiser: Denoiser, images_per_second: float) -> dict[str, Any]:
    """What a run of a given length takes.

    Args:
        settings: The run.
        denoiser: Its network, of any kind of tensors.
        images_per_second: Of all processes; 0 if it is not known.

    Returns:
        ``images`` and ``hours`` (0 without a length), bytes of ``files`` by kind, and ``weights``.
    """
    name = settings.autoencoder or _autoencoder_of(settings.latents)
    found = autoencoder_weights(name) if name else None
    own = open_autoencoder(name) if found is not None and found.found and not found.hub_id else None
    stored = own is not None and Path(own.source).is_dir()
    files = run_files(settings, denoiser, own.model if own is not None and stored else None)
    previews = settings.preview_encoder
    shown = encoder_weights(previews, settings.preview_weights) if previews else None
    needed = [weights for weights in (found, init_weights(settings.init_from), shown) if weights is not None]
    images = settings.total_images
    return {
        "images": images,
        "hours": images / images_per_second / 3600 if images_per_second else 0.0,
        "files": asdict(files),
        "weights": [asdict(weights) for weights in needed],
    }


def _autoencoder_of(latents: str) -> str:
    """The autoencoder that made a latent folder, if there is one."""
    info = Path(latents) / INFO_FILE
    if not latents or not info.is_file():
        return ""
    source = read_object(info).get("autoencoder", {}).get("source", "")
    return source if isinstance(source, str) else ""


def whole_run_text(result: dict[str, Any]) -> list[str]:
    """The same as lines."""
    files = result["files"]
    gb = {name: f"{size / 1e9:.2f}" for name, size in files.items()}
    kept = f", kept averages {gb['averages']}" if files["averages"] else ""
    lines = [f"disk: checkpoints {gb['checkpoints']} GB{kept}, model {gb['model']} GB"]
    if result["images"]:
        lines.append(f"the whole run: {result['images']:,} images, {result['hours']:.3g} hours at the rate above")
    lines += [f"weights: {Weights(**entry).text}" for entry in result["weights"] if entry["hub_id"]]
    return lines
