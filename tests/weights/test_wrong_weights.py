"""The checks of published weights fail on random weights of the same architecture, and pass on real ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from parts import stable_diffusion_vae
from published_weights import (
    AUTOENCODERS,
    ENCODERS,
    check_found_again,
    check_reconstruction,
    features_of,
    real_biopsies,
    real_colon,
    stained_otherwise,
)

from latent_medi.features.encoders import load_encoder
from latent_medi.features.registry import ENCODERS as REGISTRY
from latent_medi.features.transformer import build_timm
from latent_medi.latents.autoencoder import load_autoencoder


def test_another_file_is_not_the_published_one(tmp_path: Path) -> None:
    for published in (*AUTOENCODERS, *ENCODERS):
        (tmp_path / published.name).mkdir()
        (tmp_path / published.name / published.file).write_bytes(b"others")
        if published.sha256:
            assert len(published.sha256) == 64
            with pytest.raises(AssertionError, match=r"is not the file of https://"):
                published.check_file(tmp_path)
    assert {p.name for p in (*AUTOENCODERS, *ENCODERS) if not p.sha256} == {"taef2", "squeezenet"}


def test_real_weights_pass(shared: Path) -> None:
    patches, slides = real_biopsies(shared)
    assert patches.shape == (48, 256, 256, 3)
    assert len(set(slides)) == 12
    encoder = load_encoder("squeezenet", weights=shared / "models" / "squeezenet")
    check_found_again("squeezenet", features_of(encoder, patches), features_of(encoder, stained_otherwise(patches)))


@pytest.mark.slow
def test_a_random_autoencoder_is_found_out(shared: Path, tmp_path: Path) -> None:
    patches = real_colon(shared, 2)
    with pytest.raises(AssertionError, match="reconstructs real patches at"):
        check_reconstruction(load_autoencoder(stable_diffusion_vae(tmp_path / "vae")), patches)
    check_reconstruction(load_autoencoder(shared / "models" / "taef2"), patches)


@pytest.mark.slow  # writes and reads 1.2 GB
def test_a_random_uni_is_found_out(shared: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in build_timm(REGISTRY["uni"]).state_dict().items()}
    state = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    for name, tensor in state.items():
        if name.endswith(("norm1.weight", "norm2.weight", "norm.weight", "gamma")):
            tensor += 1
    torch.save(state, tmp_path / "pytorch_model.bin")
    encoder = load_encoder("uni", weights=tmp_path)
    patches, _ = real_biopsies(shared, slides=8, each=1)
    features, changed = features_of(encoder, patches), features_of(encoder, stained_otherwise(patches))
    assert np.isfinite(features).all()
    with pytest.raises(AssertionError, match="uni finds"):
        check_found_again("uni", features, changed)


def test_a_random_squeezenet_is_found_out(shared: Path) -> None:
    encoder = load_encoder("squeezenet", weights=shared / "models" / "squeezenet")
    torch.manual_seed(0)
    for module in encoder.module.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.reset_parameters()
    patches, _ = real_biopsies(shared)
    with pytest.raises(AssertionError, match="squeezenet finds"):
        check_found_again("squeezenet", features_of(encoder, patches), features_of(encoder, stained_otherwise(patches)))
