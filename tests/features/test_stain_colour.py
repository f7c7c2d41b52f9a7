"""Deconvolution separates the stains, and transfer moves colour without touching the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_medi.features.stain import STAINS, fit_stain, haematoxylin, transfer


def _stained(h: np.ndarray, e: np.ndarray, stains: np.ndarray = STAINS[:2]) -> np.ndarray:
    """uint8 [N, H, W, 3] from concentration maps [N, H, W]."""
    return np.rint(255 * np.power(10.0, -(h[..., None] * stains[0] + e[..., None] * stains[1]))).astype(np.uint8)


def _tissue(seed: int, h_strength: float = 0.6, e_strength: float = 0.5, stains: np.ndarray = STAINS[:2]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    h = rng.random((6, 32, 32)) ** 2 * h_strength
    e = rng.random((6, 32, 32)) ** 2 * e_strength
    return _stained(h, e, stains)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 0.8), st.floats(0, 0.8), st.floats(0, 0.8))
def test_haematoxylin_ignores_eosin(h: float, e1: float, e2: float) -> None:
    def image(e: float) -> torch.Tensor:
        density = torch.tensor(h * STAINS[0] + e * STAINS[1])
        return torch.pow(10.0, -density).reshape(1, 3, 1, 1).clamp(0.01, 1)

    # Only where nothing saturates is the light still the sum of the two stains.
    if max(e1, e2) + h < 0.9:
        a, b = haematoxylin(image(e1)), haematoxylin(image(e2))
        assert float((a - b).abs().max()) < 1e-6
        assert float(a.squeeze()) == pytest.approx(10**-h, abs=1e-6)


def test_haematoxylin_range_and_glass() -> None:
    x = torch.rand(4, 3, 8, 8)
    y = haematoxylin(x)
    assert y.shape == (4, 1, 8, 8)
    assert float(y.min()) >= 0
    assert float(y.max()) <= 1
    assert torch.allclose(haematoxylin(torch.ones(1, 3, 2, 2)), torch.ones(1, 1, 2, 2))
    assert torch.isfinite(haematoxylin(torch.zeros(1, 3, 2, 2))).all()


def test_macenko_finds_the_stains() -> None:
    stats = fit_stain(_tissue(0, 0.8, 0.7))
    cosines = np.abs((stats.stains * STAINS[:2]).sum(axis=1))
    assert cosines.min() > 0.98
    assert stats.stains[0, 0] > stats.stains[1, 0]


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_transfer_to_itself_changes_nothing(method: str) -> None:
    images = _tissue(1)
    stats = fit_stain(images)
    mapped = transfer(images, stats, stats, method)  # type: ignore[arg-type]
    assert mapped.dtype == np.uint8
    assert mapped.shape == images.shape
    assert int(np.abs(mapped.astype(int) - images.astype(int)).max()) <= 1


@pytest.mark.parametrize("method", ["reinhard", "macenko"])
def test_transfer_reaches_the_target_colour(method: str) -> None:
    other = np.array([[0.72, 0.64, 0.26], [0.2, 0.93, 0.3]])
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    source, target = _tissue(2, 0.5, 0.6), _tissue(3, 0.9, 0.35, other)
    mapped = transfer(source, fit_stain(source), fit_stain(target), method)  # type: ignore[arg-type]

    def gap(a: np.ndarray) -> float:
        return float(np.abs(a.reshape(-1, 3).mean(0) - target.reshape(-1, 3).mean(0)).max())

    assert gap(mapped) < 0.25 * gap(source)


def test_white_patches_do_not_break_the_fit() -> None:
    white = np.full((2, 16, 16, 3), 255, np.uint8)
    mapped = transfer(white, fit_stain(white), fit_stain(_tissue(4)), "macenko")
    assert (mapped == 255).all()
