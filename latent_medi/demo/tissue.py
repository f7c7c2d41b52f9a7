"""Procedural H&E-like tissue whose shape and stain parameters are known.

A patch is drawn as two maps of dye, haematoxylin and eosin, which absorb light by the Beer–Lambert law: a pixel is
``background · exp(−(h · v_h + e · v_e))`` with one absorbance vector per dye (Ruifrok & Johnston 2001, equation 1).
Shape parameters describe nuclei and glands, stain parameters the laboratory and scanner; nothing couples the two.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import expit

PATCH_SIZE = 64
"""Width and height of a patch in pixels."""

MPP = 0.75
"""Micrometres per pixel that a patch is said to have."""


@dataclass(frozen=True)
class Shape:
    """What the tissue looks like, whatever its stain.

    Args:
        nucleus_radius: Geometric mean radius of a nucleus, pixels.
        nucleus_aspect: Long axis over short axis, at least 1.
        alignment: 0 = nuclei point anywhere, 1 = all along ``orientation``.
        orientation: Direction of fibres and aligned nuclei, radians.
        density: Nuclei per patch where no gland is.
        pleomorphism: Standard deviation of the logarithm of nuclear radius.
        gland_radius: Radius of a gland's lumen, pixels; below 2 no gland is drawn.
        fibre: Contrast of the eosinophilic fibres, 0 to 1.
        vacuoles: Ice-crystal holes per patch (frozen sections).
    """

    nucleus_radius: float = 4.8
    nucleus_aspect: float = 1.3
    alignment: float = 0.2
    orientation: float = 0.0
    density: float = 15.0
    pleomorphism: float = 0.12
    gland_radius: float = 0.0
    fibre: float = 0.4
    vacuoles: float = 0.0


@dataclass(frozen=True)
class Stain:
    """How a laboratory and its scanner show the tissue.

    Args:
        haematoxylin: Absorbance of haematoxylin in red, green and blue; used with unit length.
        eosin: Absorbance of eosin in red, green and blue; used with unit length.
        haematoxylin_strength: Optical density of a nucleus.
        eosin_strength: Optical density of dense stroma.
        background: Colour of glass in red, green and blue, 0 to 1.
        blur: Standard deviation of the focus blur, pixels.
    """

    haematoxylin: tuple[float, float, float] = (0.65, 0.70, 0.29)
    eosin: tuple[float, float, float] = (0.07, 0.99, 0.11)
    haematoxylin_strength: float = 1.1
    eosin_strength: float = 0.55
    background: tuple[float, float, float] = (0.96, 0.95, 0.96)
    blur: float = 0.6


_GRID = np.mgrid[0:PATCH_SIZE, 0:PATCH_SIZE].astype(np.float32)
_FREQUENCY = np.stack(np.meshgrid(np.fft.fftfreq(PATCH_SIZE), np.fft.rfftfreq(PATCH_SIZE), indexing="ij")).astype(
    np.float32
)


def _soft_ellipses(
    centre: np.ndarray, long: np.ndarray, short: np.ndarray, angle: np.ndarray, sharpness: float = 1.6
) -> np.ndarray:
    """Soft-edged ellipses [n, size, size] in 0..1; centres [n, 2] as (row, column), axes and edge widths in pixels."""
    centre, long, short, angle = (np.asarray(a, np.float32)[..., None, None] for a in (centre, long, short, angle))
    row, column = _GRID[0] - centre[:, 0], _GRID[1] - centre[:, 1]
    cos, sin = np.cos(angle), np.sin(angle)
    distance = np.hypot((column * cos + row * sin) / long, (row * cos - column * sin) / short)
    return expit((1.0 - distance) * (2.0 * sharpness * np.sqrt(long * short)))


def _fibres(shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """Oriented noise [size, size] of zero mean and unit variance: white noise filtered along ``orientation``."""
    across = -np.sin(shape.orientation) * _FREQUENCY[1] + np.cos(shape.orientation) * _FREQUENCY[0]
    along = np.cos(shape.orientation) * _FREQUENCY[1] + np.sin(shape.orientation) * _FREQUENCY[0]
    stretch = 1.0 + 2.5 * shape.alignment
    band = np.exp(-((along * stretch / 0.07) ** 2) - (across / 0.11) ** 2)
    noise = np.fft.irfft2(
        np.fft.rfft2(rng.standard_normal((PATCH_SIZE, PATCH_SIZE), np.float32)) * band, s=(PATCH_SIZE, PATCH_SIZE)
    )
    return ((noise - noise.mean()) / (noise.std() + 1e-8)).astype(np.float32)


def _gland_centres(radius: float, rng: np.random.Generator) -> np.ndarray:
    """Centres [n, 2] of glands that keep their distance; fewer fit the larger they are."""
    reach = 2.0 * radius + 13.0
    wanted = int(np.clip(round((PATCH_SIZE + radius) ** 2 / (reach * reach * 1.3)), 1, 4))
    centres: list[np.ndarray] = []
    for candidate in rng.uniform(-0.25 * radius, PATCH_SIZE + 0.25 * radius, (40, 2)):
        if all(np.hypot(*(candidate - other)) > reach for other in centres):
            centres.append(candidate)
        if len(centres) == wanted:
            break
    return np.array(centres)


def render(shape: Shape, stain: Stain, rng: np.random.Generator) -> np.ndarray:
    """Draw one patch.

    Args:
        shape: Shape parameters.
        stain: Stain parameters.
        rng: Source of everything that is not a parameter: positions, textures, sensor noise.

    Returns:
        uint8 RGB, [64, 64, 3].
    """
    size = PATCH_SIZE
    spacing = size / np.sqrt(max(shape.density, 3.0))
    steps = np.arange(-0.5 * spacing, size + spacing, spacing)
    grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2) + rng.uniform(0, spacing, 2)
    centres = grid + rng.uniform(-0.38, 0.38, grid.shape) * spacing
    spread = (1.0 - shape.alignment) * np.pi / 2
    angles = shape.orientation + rng.uniform(-spread, spread, len(centres))
    lumen = np.zeros((size, size), np.float32)
    epithelium = np.zeros((size, size), np.float32)
    if shape.gland_radius >= 2.0:
        glands = _gland_centres(shape.gland_radius, rng)
        radius = shape.gland_radius * np.exp(rng.normal(0, 0.08, len(glands)))
        squeeze = np.exp(rng.uniform(0.0, 0.25, len(glands)))
        tilt = rng.uniform(0, np.pi, len(glands))
        lumen = _soft_ellipses(glands, radius * squeeze, radius / squeeze, tilt, 1.0).max(0)
        wall = 2.0 * shape.nucleus_radius
        epithelium = _soft_ellipses(glands, radius * squeeze + wall, radius / squeeze + wall, tilt, 1.0).max(0)
        outside = np.array(
            [
                np.hypot(*(glands - c).T).min() > 0
                and np.all(np.hypot(*(glands - c).T) > radius + wall + shape.nucleus_radius)
                for c in centres
            ]
        )
        centres, angles = centres[outside], angles[outside]
        ring_centres, ring_angles = [], []
        for centre, r, s, a in zip(glands, radius, squeeze, tilt, strict=True):
            around = max(5, int(2 * np.pi * (r + 0.6 * wall) / (2.3 * shape.nucleus_radius)))
            turn = np.linspace(0, 2 * np.pi, around, endpoint=False) + rng.uniform(0, 6.3) + rng.normal(0, 0.08, around)
            u, v = (r * s + 0.6 * wall) * np.cos(turn), (r / s + 0.6 * wall) * np.sin(turn)
            ring_centres.append(centre + np.stack([u * np.sin(a) + v * np.cos(a), u * np.cos(a) - v * np.sin(a)], -1))
            ring_angles.append(np.arctan2(u * np.sin(a) + v * np.cos(a), u * np.cos(a) - v * np.sin(a)))
        centres = np.concatenate([centres, *ring_centres])
        angles = np.concatenate([angles, *ring_angles])
    inside = np.all((centres > -9) & (centres < size + 9), axis=1)
    centres, angles = centres[inside], angles[inside]
    radii = shape.nucleus_radius * np.exp(rng.normal(0, shape.pleomorphism, len(centres)))
    aspect = np.maximum(1.0, shape.nucleus_aspect * np.exp(rng.normal(0, 0.08, len(centres))))
    dark = np.exp(rng.normal(0, 0.15, len(centres)))
    if len(centres):
        masks = _soft_ellipses(centres, radii * np.sqrt(aspect), radii / np.sqrt(aspect), angles)
        nuclei = 1.0 - np.prod(1.0 - np.clip(masks * (0.8 * dark.astype(np.float32))[:, None, None], 0, 0.98), axis=0)
    else:
        nuclei = np.zeros((size, size), np.float32)
    chromatin = gaussian_filter(rng.standard_normal((size, size), np.float32), 1.2)
    h = nuclei * (1.0 + 0.3 * chromatin) + 0.06 + 0.10 * epithelium * (1 - lumen)
    e = (0.62 + 0.30 * shape.fibre * _fibres(shape, rng)) * (1.0 - 0.35 * epithelium) * (1.0 - 0.5 * nuclei)
    tissue = 1.0 - 0.94 * lumen * (1.0 - nuclei)
    if shape.vacuoles >= 0.5:
        holes = rng.poisson(shape.vacuoles)
        if holes:
            r = rng.uniform(1.8, 3.2, holes)
            tissue = tissue * (1.0 - 0.85 * _soft_ellipses(rng.uniform(0, size, (holes, 2)), r, r, r, 1.2).max(0))
    h, e = np.clip(h * tissue, 0, None), np.clip(e * tissue, 0, None)
    v_h = np.asarray(stain.haematoxylin) / np.linalg.norm(stain.haematoxylin)
    v_e = np.asarray(stain.eosin) / np.linalg.norm(stain.eosin)
    density = h[..., None] * (stain.haematoxylin_strength * v_h) + e[..., None] * (stain.eosin_strength * v_e)
    image = (np.asarray(stain.background) * np.exp(-density)).astype(np.float32)
    if stain.blur > 0.05:
        image = gaussian_filter(image, (stain.blur, stain.blur, 0), mode="nearest")
    image = image + 0.005 * rng.standard_normal(image.shape, np.float32)
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def jitter_stain(stain: Stain, rng: np.random.Generator, amount: float = 1.0) -> Stain:
    """The stain of one slide: strengths vary by about 12 %, absorbance vectors by about 3 % and glass by 1 % at
    ``amount`` 1.
    """

    def vector(value: tuple[float, float, float], sigma: float) -> tuple[float, float, float]:
        moved = np.clip(np.asarray(value) + rng.normal(0, sigma * amount, 3), 0.01, 1.0)
        return (float(moved[0]), float(moved[1]), float(moved[2]))

    return replace(
        stain,
        haematoxylin=vector(stain.haematoxylin, 0.025),
        eosin=vector(stain.eosin, 0.025),
        haematoxylin_strength=stain.haematoxylin_strength * float(np.exp(rng.normal(0, 0.10 * amount))),
        eosin_strength=stain.eosin_strength * float(np.exp(rng.normal(0, 0.12 * amount))),
        background=vector(stain.background, 0.008),
        blur=stain.blur * float(np.exp(rng.normal(0, 0.08 * amount))),
    )


def random_shape(rng: np.random.Generator) -> Shape:
    """Shape parameters drawn independently over wide ranges: tissue of no class, to train the frozen networks on."""
    return Shape(
        nucleus_radius=rng.uniform(3.8, 6.0),
        nucleus_aspect=rng.uniform(1.1, 3.0),
        alignment=rng.uniform(0.0, 1.0),
        orientation=rng.uniform(0, np.pi),
        density=rng.uniform(8, 21),
        pleomorphism=rng.uniform(0.05, 0.3),
        gland_radius=rng.uniform(2.5, 15.0) if rng.random() < 0.4 else 0.0,
        fibre=rng.uniform(0.1, 0.9),
        vacuoles=rng.uniform(3, 10) if rng.random() < 0.4 else 0.0,
    )


def random_stain(rng: np.random.Generator) -> Stain:
    """Stain parameters drawn over wide ranges: a laboratory of no site, to train the frozen networks on."""

    def near(value: tuple[float, float, float], width: float) -> tuple[float, float, float]:
        moved = np.clip(np.asarray(value) + rng.uniform(-width, width, 3), 0.01, 1.0)
        return (float(moved[0]), float(moved[1]), float(moved[2]))

    glass = float(rng.uniform(0.86, 0.98))
    return Stain(
        haematoxylin=near((0.66, 0.68, 0.30), 0.13),
        eosin=near((0.09, 0.95, 0.22), 0.13),
        haematoxylin_strength=rng.uniform(0.6, 1.6),
        eosin_strength=rng.uniform(0.3, 0.95),
        background=near((glass, glass, glass), 0.03),
        blur=rng.uniform(0.2, 1.3),
    )


def parameters(shape: Shape) -> dict[str, float]:
    """The shape parameters as numbers, to compare predictions with."""
    return {f.name: float(getattr(shape, f.name)) for f in fields(Shape)}
