"""Stain colour: deconvolution into haematoxylin, and mapping the stain of one site to that of another.

Ruifrok & Johnston 2001 for deconvolution; Reinhard et al. 2001 and Macenko et al. 2009 for transfer. Optical density
is decadic: OD = −log10(I), with I the transmitted share of light.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch

from latent_medi.statistics.subsampling import balanced_draw

HAEMATOXYLIN = (0.65, 0.70, 0.29)  # optical density of red, green and blue, Ruifrok & Johnston 2001, table 2
EOSIN = (0.07, 0.99, 0.11)
Method = Literal["reinhard", "macenko"]
STAIN_METHODS: tuple[Method, ...] = ("reinhard", "macenko")

_DARKEST = 1.0 / 256.0  # 8-bit zero is read as half a level or so, never as infinite density
_MAX_PIXELS = 200_000
_PATCHES_PER_FIT = 240
_TISSUE = 0.065  # mean decadic density below which a pixel counts as glass (0.15 in natural units, Macenko 2009)


def _stain_matrix() -> np.ndarray:
    """Unit rows haematoxylin, eosin and what neither explains (their cross product)."""
    h, e = np.array(HAEMATOXYLIN), np.array(EOSIN)
    h, e = h / np.linalg.norm(h), e / np.linalg.norm(e)
    rest = np.cross(h, e)
    return np.stack([h, e, rest / np.linalg.norm(rest)])


STAINS = _stain_matrix()


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _of_haematoxylin(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Share of each channel's density in haematoxylin, [3]; copied to a device once."""
    return torch.as_tensor(np.linalg.inv(STAINS)[:, 0], dtype=dtype, device=device)


def haematoxylin(images: torch.Tensor) -> torch.Tensor:
    """Light that each patch would transmit if it were stained with haematoxylin alone.

    Args:
        images: RGB in [0, 1], float, [N, 3, H, W].

    Returns:
        10^(−c_h), in [0, 1], [N, 1, H, W]; c_h ≥ 0 is the concentration of haematoxylin (Ruifrok & Johnston 2001).
        Glass is 1; eosin has no effect.
    """
    density = -torch.log10(images.clamp(_DARKEST, 1.0))
    concentration = torch.einsum("nchw,c->nhw", density, _of_haematoxylin(images.dtype, images.device)).clamp_min(0.0)
    return torch.pow(10.0, -concentration)[:, None]


@dataclass(frozen=True)
class StainStats:
    """Colour statistics of one site, for both transfer methods.

    Args:
        mean: Mean of each channel in lαβ, [3].
        std: Standard deviation of each channel in lαβ, [3].
        stains: Unit density vectors of haematoxylin and eosin (rows), [2, 3].
        strength: 99th percentile of each stain's concentration, [2].
        n_patches: Patches that went in.
    """

    mean: np.ndarray
    std: np.ndarray
    stains: np.ndarray
    strength: np.ndarray
    n_patches: int


# RGB → LMS, then log10, then the decorrelating rotation (Reinhard et al. 2001, equations 4 and 6).
_TO_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]])
_TO_LAB = np.diag([1 / np.sqrt(3), 1 / np.sqrt(6), 1 / np.sqrt(2)]) @ np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]])
_FROM_LMS = np.linalg.inv(_TO_LMS)
_FROM_LAB = np.linalg.inv(_TO_LAB)


def _lab(pixels: np.ndarray) -> np.ndarray:
    light = np.maximum(pixels.astype(np.float64) / 255.0, _DARKEST)
    return np.log10(light @ _TO_LMS.T) @ _TO_LAB.T


def _from_lab(lab: np.ndarray) -> np.ndarray:
    return np.power(10.0, lab @ _FROM_LAB.T) @ _FROM_LMS.T * 255.0


def _density(pixels: np.ndarray) -> np.ndarray:
    return -np.log10(np.clip(pixels.astype(np.float64) / 255.0, _DARKEST, 1.0))


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def fit_stain(images: np.ndarray) -> StainStats:
    """Colour statistics of a set of patches.

    Args:
        images: uint8 [N, H, W, 3], N ≥ 1. At most 200,000 evenly spaced pixels are used.
    """
    pixels = images.reshape(-1, 3)
    pixels = pixels[:: max(1, len(pixels) // _MAX_PIXELS)]
    lab = _lab(pixels)
    density = _density(pixels)
    tissue = density[density.mean(axis=1) > _TISSUE]
    stains = _macenko(tissue) if len(tissue) >= 100 else STAINS[:2]
    concentrations = (tissue if len(tissue) else density) @ np.linalg.pinv(stains)
    strength = np.maximum(np.percentile(concentrations, 99, axis=0), 1e-3)
    return StainStats(lab.mean(axis=0), np.maximum(lab.std(axis=0), 1e-6), stains, strength, len(images))


def tissue_density(images: np.ndarray) -> np.ndarray:
    """Mean optical density of the tissue in each patch.

    Args:
        images: uint8 [N, H, W, 3].

    Returns:
        Decadic density of red, green and blue, float64 [N, 3], ≥ 0; NaN for a patch of glass alone.
    """
    density = _density(images.reshape(len(images), -1, 3))
    tissue = (density.mean(axis=2, keepdims=True) > _TISSUE).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return (density * tissue).sum(axis=1) / tissue.sum(axis=1)


def stain_angles(a: StainStats, b: StainStats) -> tuple[float, float]:
    """Angle between the haematoxylin vectors, and between the eosin vectors, of two stains, in degrees, 0 to 90."""
    cosines = np.clip((a.stains * b.stains).sum(axis=1), -1.0, 1.0)
    haematoxylin, eosin = np.degrees(np.arccos(np.abs(cosines)))
    return float(haematoxylin), float(eosin)


def _macenko(density: np.ndarray, percentile: float = 1.0) -> np.ndarray:
    """Haematoxylin and eosin vectors as the extreme angles in the plane of greatest variation (Macenko et al. 2009)."""
    plane = np.linalg.eigh(np.cov(density.T))[1][:, [2, 1]]
    plane = plane * np.where(plane.sum(axis=0) < 0, -1.0, 1.0)
    angles = np.arctan2(density @ plane[:, 1], density @ plane[:, 0])
    extremes = np.percentile(angles, [percentile, 100 - percentile])
    vectors = np.stack([plane @ np.array([np.cos(a), np.sin(a)]) for a in extremes])
    vectors = np.abs(vectors) / np.linalg.norm(vectors, axis=1, keepdims=True)
    # Haematoxylin absorbs red, eosin hardly does.
    vectors = vectors[np.argsort(-vectors[:, 0])]
    degenerate = abs(vectors[0] @ vectors[1]) > 0.999
    return STAINS[:2] if degenerate else vectors


def transfer(images: np.ndarray, source: StainStats, target: StainStats, method: Method = "reinhard") -> np.ndarray:
    """Patches of the source site in the stain of the target site.

    Args:
        images: uint8 [N, H, W, 3].
        source: Statistics of the site that the patches come from.
        target: Statistics of the site to imitate.
        method: "reinhard" matches mean and standard deviation of each lαβ channel; "macenko" replaces the stain vectors
            and their strength, and keeps the residual that the two stains do not explain.

    Returns:
        uint8 [N, H, W, 3].
    """
    flat = images.reshape(-1, 3)
    if method == "reinhard":
        lab = (_lab(flat) - source.mean) * (target.std / source.std) + target.mean
        return _to_uint8(_from_lab(lab)).reshape(images.shape)
    density = _density(flat)
    concentrations = density @ np.linalg.pinv(source.stains)
    residual = density - concentrations @ source.stains
    mapped = (concentrations * (target.strength / source.strength)) @ target.stains + residual
    return _to_uint8(np.power(10.0, -mapped) * 255.0).reshape(images.shape)


@dataclass(frozen=True)
class SiteStains:
    """Measures the stain of sites on real patches, and maps patches of one site to the stain of another.

    Args:
        read: Reads patches, uint8 [n, H, W, 3], by their positions among the N that stains are measured on.
        sites: Site of each of these patches, [N]; any other field whose values differ in stain serves as well.
        classes: Class of each, [N].
        seed: Seed of the choice of up to 240 patches per stain.
        repeat: How classes share these, see :func:`~latent_medi.statistics.subsampling.balanced_draw`; patches that are
            drawn twice count once.
    """

    read: Callable[[np.ndarray], np.ndarray]
    sites: np.ndarray
    classes: np.ndarray
    seed: int
    repeat: bool = True

    def pair(self, source: str, target: str) -> tuple[StainStats, StainStats]:
        """Stains of two sites, each from patches of the classes that both have (of all, if none), in equal parts."""
        shared = set(self.classes[self.sites == source]) & set(self.classes[self.sites == target])
        return self._fit(source, list(shared)), self._fit(target, list(shared))

    def _fit(self, site: str, classes: list[str]) -> StainStats:
        rows = np.flatnonzero((self.sites == site) & (np.isin(self.classes, classes) if classes else True))
        count = min(_PATCHES_PER_FIT, len(rows)) if self.repeat else _PATCHES_PER_FIT
        drawn = balanced_draw(self.classes[rows], count, np.random.default_rng([self.seed, 11]), self.repeat)
        return fit_stain(self.read(rows[np.unique(drawn)]))

    def transferred(self, images: np.ndarray, sites: np.ndarray, target: str) -> dict[str, np.ndarray]:
        """Patches in the stain of the target site, by method, uint8 [N, H, W, 3].

        Args:
            images: uint8 [N, H, W, 3].
            sites: Site of each, [N].
            target: Site to imitate.
        """
        result: dict[str, np.ndarray] = {method: np.empty_like(images) for method in STAIN_METHODS}
        for site in np.unique(sites):
            here = sites == site
            own, wanted = self.pair(str(site), target)
            for method in STAIN_METHODS:
                result[method][here] = transfer(images[here], own, wanted, method)
        return result


def jitter_stains(images: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Patches with each stain's amount changed at random, as colour augmentation in haematoxylin-eosin space does.

    After Tellez et al. 2018: the concentration of haematoxylin, of eosin and of what neither explains becomes
    α·c + β, α ~ U(1 − σ, 1 + σ), β ~ U(−σ/10, σ/10) in decadic optical density, drawn per patch and stain.

    Args:
        images: uint8 [N, H, W, 3].
        sigma: σ in [0, 1); 0 changes nothing but rounding.
        rng: Source of α and β.

    Returns:
        uint8 [N, H, W, 3].
    """
    alpha = rng.uniform(1 - sigma, 1 + sigma, (len(images), 1, 3))
    beta = rng.uniform(-sigma / 10, sigma / 10, (len(images), 1, 3))
    density = _density(images.reshape(len(images), -1, 3))
    changed = (density @ np.linalg.inv(STAINS) * alpha + beta) @ STAINS
    return _to_uint8(np.power(10.0, -changed) * 255.0).reshape(images.shape)
