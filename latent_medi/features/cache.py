"""Features on disk, keyed by what they were made from, so that nothing is embedded twice and nothing stale is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from latent_medi.features.encoders import ImageEncoder
from latent_medi.files import atomic_path, remove
from latent_medi.progress import get_logger, progress
from latent_medi.shards.dataset import PatchDataset

log = get_logger(__name__)


def dataset_hash(dataset: PatchDataset) -> str:
    """Hash of the pixels (shard hashes) and of which row is which patch (keys in order)."""
    digest = hashlib.sha256()
    for shard in dataset.info["shards"]:
        digest.update(str(shard["sha256"]).encode())
    digest.update("\n".join(dataset.index["key"]).encode())
    return digest.hexdigest()


def cached_features(
    dataset: PatchDataset,
    rows: np.ndarray,
    encoder: ImageEncoder,
    cache_folder: str | Path,
    batch: int = 128,
    device: str | None = None,
) -> np.ndarray:
    """Features of some rows of a dataset, embedding only those that the cache lacks.

    Args:
        dataset: Real or synthetic patches.
        rows: Row numbers of the index; any order, repeats allowed.
        encoder: The encoder.
        cache_folder: Where the cache lies; one file per dataset content and encoder fingerprint.
        batch: Patches per forward pass.
        device: Torch device; the encoder's own if None.

    Returns:
        float32 [len(rows), d], in the order of ``rows``.
    """
    rows = np.asarray(rows, np.int64)
    n = len(dataset.index)
    key = hashlib.sha256(f"{dataset_hash(dataset)} {encoder.fingerprint}".encode()).hexdigest()[:32]
    path = Path(cache_folder) / f"features-{key}.safetensors"
    features, known = _read(path, n, encoder.dim)
    missing = np.unique(rows[~known[rows]])
    if len(missing):
        desc = f"{encoder.name} features"
        batches = (images for _, images in _batches(dataset, missing, batch, desc))
        features[missing] = encoder.features(batches, device)
        known[missing] = True
        with atomic_path(path) as temporary:
            save_file({"features": features, "known": known.astype(np.uint8)}, temporary)
    return features[rows]


def _read(path: Path, n: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    if path.is_file():
        try:
            stored = load_file(path)
            features, known = stored["features"], stored["known"].astype(bool)
            if features.shape == (n, dim) and known.shape == (n,):
                return features, known
        except Exception as error:  # a damaged cache costs time, nothing else: everything in it can be made again
            log.warning("Feature cache %s is damaged (%s); embedding again.", path, error)
        remove(path)
    return np.zeros((n, dim), np.float32), np.zeros(n, bool)


def _batches(dataset: PatchDataset, rows: np.ndarray, batch: int, desc: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    total = -(-len(rows) // batch)
    yield from progress(dataset.iterate(rows, batch), total=total, desc=desc, unit="batch")
