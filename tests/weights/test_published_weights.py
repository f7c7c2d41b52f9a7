"""Published weights, as downloaded: the right files, loaded strictly, and what they make is what such weights make.

    LATENT_MEDI_WEIGHTS=folder pytest -m weights

Whatever is in the folder is tested; of the rest the summary says what to download and where to put it.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from published_weights import (
    AUTOENCODERS,
    ENCODERS,
    Published,
    check_found_again,
    check_neighbours,
    check_reconstruction,
    check_zero,
    features_of,
    real_biopsies,
    real_colon,
    stained_otherwise,
)

from latent_medi.features.encoders import load_encoder
from latent_medi.features.registry import ENCODERS as REGISTRY
from latent_medi.latents.autoencoder import load_autoencoder

pytestmark = pytest.mark.weights


def whole_folder(published: Published) -> Path:
    """The folder of one network's files, their hashes compared."""
    if "LATENT_MEDI_WEIGHTS" not in os.environ:
        pytest.skip("not run: set LATENT_MEDI_WEIGHTS to a folder of published weights (docs/offline.md)")
    folder = Path(os.environ["LATENT_MEDI_WEIGHTS"]).expanduser().resolve()
    if not all((folder / published.name / name).is_file() for name in (published.file, *published.also)):
        pytest.skip(published.how(folder))
    published.check_file(folder)
    return folder / published.name


@pytest.mark.parametrize("published", AUTOENCODERS, ids=lambda published: published.name)
def test_an_autoencoder_gives_real_patches_back(published: Published, request: pytest.FixtureRequest) -> None:
    folder = whole_folder(published)
    autoencoder = load_autoencoder(folder)
    patches = real_colon(request.getfixturevalue("shared"))
    mean, _ = autoencoder.encode(patches[:1])
    channels = {"sd-vae-ft-mse": 4, "taef2": 32}[published.name]
    assert mean.shape == (1, channels, 32, 32)
    check_reconstruction(autoencoder, patches)


@pytest.mark.parametrize("published", ENCODERS, ids=lambda published: published.name)
def test_an_encoder_knows_patches_again(published: Published, request: pytest.FixtureRequest) -> None:
    folder = whole_folder(published)
    encoder = load_encoder(published.name, weights=folder)
    patches, slides = real_biopsies(request.getfixturevalue("shared"))
    features = features_of(encoder, patches)
    assert features.shape == (len(patches), REGISTRY[published.name].dim)
    assert np.abs(features - features[0]).max(1)[1:].min() > 0
    check_found_again(published.name, features, features_of(encoder, stained_otherwise(patches)))
    check_neighbours(published.name, features, slides)
    if published.name == "inception":
        check_zero(published.name, features)
