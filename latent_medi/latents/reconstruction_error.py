"""The reconstruction error of the autoencoder, which is part of every sample of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from latent_medi.core.progress import progress
from latent_medi.features.cache import warn_if_demo_encoder
from latent_medi.features.encoders import load_encoder
from latent_medi.latents.autoencoder import Autoencoder
from latent_medi.latents.settings import ReconstructionSettings
from latent_medi.latents.store import LatentStore
from latent_medi.shards.dataset import PatchDataset
from latent_medi.statistics.distances import RANK_RULE, frechet_distance, full_rank
from latent_medi.statistics.kernel_distance import KID_UNIT, kid_text, polynomial_kernel


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each image in dB, float64 [n].

    Args:
        images, others: uint8 [n, H, W, 3]. Equal images get the ratio of one wrong value by one grey level, since
            theirs is infinite.
    """
    difference = images.astype(np.float64) - others
    error = np.maximum(np.square(difference).mean((1, 2, 3)), 1.0 / difference[0].size)
    return 10.0 * np.log10(255.0**2 / error)


def paired_kid(a: np.ndarray, b: np.ndarray) -> float:
    """Kernel distance of features whose rows belong together, float64.

    A reconstruction is like its own original, which would pull the distance of independent samples below zero; so pairs
    i = j are left out of all three terms (Gretton et al. 2012, eq. 4), with the cubic kernel of KID.

    Args:
        a, b: [n, d] each, n ≥ 2.
    """
    between = polynomial_kernel(a, b)
    kernel = polynomial_kernel(a, a) + polynomial_kernel(b, b) - between - between.T
    return float((kernel.sum() - np.trace(kernel)) / (len(a) * (len(a) - 1)))


def measure_reconstruction(
    data: PatchDataset,
    latents: Path,
    autoencoder: Autoencoder,
    settings: ReconstructionSettings,
    batch: int,
    workers: int = 0,
) -> dict[str, Any]:
    """The distance between patches and their reconstructions from stored means.

    Args:
        data: The dataset.
        latents: Its finished latent folder; view 0 is decoded.
        autoencoder: What encoded it.
        settings: How many patches, drawn without replacement, and which encoder.
        batch: Patches per forward pass.
        workers: Threads that decode images.

    Returns:
        ``patches`` (n), ``of`` (patches in all), ``seed``; ``psnr`` with ``mean`` in dB, and ``worst`` with its
        ``worst_key``; ``encoder`` with ``name``, ``fingerprint`` and ``dim``; ``metric`` ("fd" or "kid"), ``fd``
        (``None`` below two patches per feature), ``kid`` (``None`` below two patches).

    Raises:
        UserError: The encoder is unknown or not at hand.
    """
    encoder = load_encoder(settings.encoder, settings.weights or None, autoencoder.device)
    warn_if_demo_encoder(encoder, data)
    store = LatentStore(latents, "mmap")
    n = min(settings.patches, len(store))
    rows = np.sort(store.rows[np.random.default_rng(settings.seed).choice(len(store), n, replace=False)])
    ratios, features = [], []
    starts = range(0, n, batch)
    for start in progress(starts, n, "reconstruction error", "patches", batch):
        part = rows[start : start + batch]
        images = data.read(part, workers)
        decoded = autoencoder.decode(store.moments(part)[0])
        ratios.append(psnr(images, decoded))
        features.append([encoder.features([images]), encoder.features([decoded])])
    ratio = np.concatenate(ratios)
    real, rebuilt = (np.concatenate(parts) for parts in zip(*features, strict=True))
    valid = full_rank(n, encoder.dim)
    return {
        "patches": n,
        "of": len(store),
        "seed": settings.seed,
        "psnr": {
            "mean": float(ratio.mean()),
            "worst": float(ratio.min()),
            "worst_key": str(data.index["key"].iloc[rows[ratio.argmin()]]),
        },
        "encoder": {"name": encoder.name, "fingerprint": encoder.fingerprint, "dim": encoder.dim},
        "metric": "fd" if valid else "kid",
        "fd": frechet_distance(real, rebuilt) if valid else None,
        "kid": paired_kid(real, rebuilt) if n >= 2 else None,
    }


def reconstruction_text(error: dict[str, Any]) -> str:
    """The reconstruction error in one line."""
    ratio, encoder = error["psnr"], error["encoder"]
    least = RANK_RULE * encoder["dim"]
    if error["fd"] is not None:
        distance = f"Fréchet distance {error['fd']:.4g}, {KID_UNIT} {kid_text(error['kid'])}"
    elif error["kid"] is not None:
        distance = f"{KID_UNIT} {kid_text(error['kid'])}; a Fréchet distance takes {least:,} patches"
    else:
        distance = f"no distance of one patch; a Fréchet distance takes {least:,}"
    return (
        f"Reconstruction error over {error['patches']:,} of {error['of']:,} patches: {ratio['mean']:.2f} dB, worst "
        f"{ratio['worst']:.2f} dB ({ratio['worst_key']}); {distance} ({encoder['name']}, {encoder['dim']} features)."
    )
