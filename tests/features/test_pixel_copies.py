"""Copies are found by their pixels, whatever was done to hide them; neighbours in blocks are the neighbours."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from latent_medi.demo.tissue import random_shape, random_stain, render
from latent_medi.features.pixel_copies import VIEWS, copy_scores, invariants, small_patches


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    draws = [np.random.default_rng(i) for i in range(24)]
    return np.stack([render(random_shape(rng), random_stain(rng), rng) for rng in draws])


def symmetry(image: np.ndarray, view: int) -> np.ndarray:
    """The view of :data:`VIEWS`: turned, then mirrored."""
    turned = np.rot90(image, view % 4)
    return turned[:, ::-1] if view >= 4 else turned


@pytest.mark.parametrize("view", range(8))
def test_every_symmetry_is_a_copy_and_named(tissue: np.ndarray, view: int) -> None:
    small = small_patches(tissue)
    copies = small_patches(np.stack([symmetry(image, view) for image in tissue]))
    everyone = np.tile(np.arange(len(small)), (len(small), 1))
    score, position, code = copy_scores(copies, small, everyone)
    assert (position == np.arange(len(small))).all()
    assert score.min() > 0.999
    # The name says how the copy is turned to lie on the original again.
    back = np.stack([symmetry(symmetry(image, view), int(c)) for image, c in zip(tissue, code, strict=True)])
    assert np.array_equal(back, tissue)
    assert len(VIEWS) == 8
    np.testing.assert_allclose(invariants(copies), invariants(small), atol=1e-4)


def test_codecs_stain_and_shifts_do_not_hide_a_copy(tissue: np.ndarray) -> None:
    def encoded(image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=70)
        return np.asarray(Image.open(file))

    small = small_patches(tissue)
    everyone = np.tile(np.arange(len(small)), (len(small), 1))
    other = copy_scores(small, small, np.stack([np.delete(np.arange(len(small)), i) for i in range(len(small))]))[0]
    for change in (
        encoded,
        lambda image: np.rint(255 * (image / 255.0) ** 1.3).astype(np.uint8),
        lambda image: np.roll(image, (4, -4), (0, 1)),
        lambda image: np.rint(image * [0.9, 0.8, 1.0]).astype(np.uint8),
    ):
        score, position, _ = copy_scores(small_patches(np.stack([change(image) for image in tissue])), small, everyone)
        assert (position == np.arange(len(small))).all()
        assert score.min() > 0.9 > 0.6 > other.max()


def test_empty_patches_are_nobodys_copies() -> None:
    rng = np.random.default_rng(0)
    empty = np.clip(240 + rng.normal(0, 0.5, (3, 64, 64, 3)), 0, 255).astype(np.uint8)
    small = small_patches(empty)
    assert copy_scores(small, small, np.array([[1, 2], [0, 2], [0, 1]]))[0].max() == 0.0
