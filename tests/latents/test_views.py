"""The symmetries of the square, and that latents do not turn with their images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from parts import random_images
from PIL import Image

from latent_medi.latents.autoencoder import load_autoencoder
from latent_medi.latents.views import VIEWS, view_of


def test_the_views_are_the_eight_symmetries() -> None:
    images = random_images(2, 6)
    views = [view_of(images, v) for v in range(VIEWS)]
    assert np.array_equal(views[0], images)
    assert len({v.tobytes() for v in views}) == 8
    # A group: every view of a view is one of the eight.
    known = {v.tobytes() for v in views}
    assert all(view_of(a, v).tobytes() in known for a in views for v in range(VIEWS))
    assert np.array_equal(views[4], images[:, :, ::-1])
    assert np.array_equal(views[2], images[:, ::-1, ::-1])
    assert np.array_equal(views[1], np.stack([np.rot90(image) for image in images]))


def test_each_patch_has_its_own_view() -> None:
    images = random_images(5, 6)
    views = np.array([3, 0, 7, 3, 4])
    mixed = view_of(images, views)
    for image, view, out in zip(images, views, mixed, strict=True):
        assert np.array_equal(view_of(image[None], int(view))[0], out)


@pytest.mark.parametrize("name", ["demo", "taef2"])
def test_turning_latents_is_not_turning_images(shared, name: str) -> None:
    files = sorted((shared / "data" / "prostate" / "images").glob("*.jpeg"))[::300][:8]
    images = np.stack([np.asarray(Image.open(f).convert("RGB").resize((64, 64))) for f in files])
    autoencoder = load_autoencoder(name if name == "demo" else shared / "models" / name)
    latents = autoencoder.encode(images)[0]
    spread = (latents - latents.mean((0, 2, 3), keepdim=True)).square().mean().sqrt()
    turned = torch.from_numpy(view_of(latents.permute(0, 2, 3, 1).numpy(), 2)).permute(0, 3, 1, 2)
    error = (autoencoder.encode(view_of(images, 2))[0] - turned).square().mean().sqrt()
    assert error > 0.5 * spread
