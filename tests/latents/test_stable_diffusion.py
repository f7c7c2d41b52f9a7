"""The architecture of Stable Diffusion's autoencoder at 256 px, with random weights: encoding through the verb."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from latents_parts import make_dataset
from parts import stable_diffusion_vae

from latent_medi.cli import main
from latent_medi.latents.autoencoder import load_autoencoder
from latent_medi.latents.store import LatentStore


def test_the_architecture_is_the_published_one(tmp_path) -> None:
    autoencoder = load_autoencoder(stable_diffusion_vae(tmp_path / "vae"))
    assert sum(p.numel() for p in autoencoder.model.parameters()) == 83_653_863
    assert (autoencoder.latent_channels, autoencoder.factor, autoencoder.deterministic) == (4, 8, False)
    assert autoencoder.model.config["scaling_factor"] == 0.18215


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For this test alone: sums of others depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("two_threads")
def test_patches_of_256_px_through_the_verb(tmp_path) -> None:
    folder = stable_diffusion_vae(tmp_path / "vae")
    data = make_dataset(tmp_path / "data", count=12, per_shard=8, size=256)
    words = ["encode", f"data={data.folder}", f"out={tmp_path / 'latents'}", f"autoencoder={folder}"]
    words += ["device=cpu", "device_batch=8", "reconstruction_error.patches=4", "--json", str(tmp_path / "told.json")]
    assert main(words) == 0
    store = LatentStore(tmp_path / "latents")
    assert (len(store), store.shape) == (12, (4, 32, 32))
    mean, std = store.moments(range(12))

    # What diffusers itself gives on [-1, 1], for every patch.
    autoencoder = load_autoencoder(folder)
    bare = autoencoder.model
    with torch.no_grad():
        for i in range(0, 12, 4):
            x = torch.from_numpy(data.read(range(i, i + 4))).permute(0, 3, 1, 2).float() / 127.5 - 1
            assert x.min() >= -1
            assert x.max() <= 1
            posterior = bare.encode(x).latent_dist
            # Half of fp16's spacing is 2**-11 of a value; a rounding of fp32 may push one over the edge.
            torch.testing.assert_close(mean[i : i + 4], posterior.mean, rtol=2**-10, atol=1e-5)
            torch.testing.assert_close(std[i : i + 4], posterior.std, rtol=2**-10, atol=1e-5)
        # White is 1 and black −1 for the network. (Its latents of one flat colour are rounding blown up by its
        # normalisation, so that they cannot be compared.)
        fed: list[torch.Tensor] = []
        hook = bare.encoder.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0]))
        flat = np.repeat(np.array([255, 0], np.uint8), 64 * 64 * 3).reshape(2, 64, 64, 3)
        autoencoder.encode(flat)
        hook.remove()
        assert bool((fed[0][0] == 1).all())
        assert bool((fed[0][1] == -1).all())

        # Raw latents, no scaling factor: decoding what was stored is the bare call.
        image = autoencoder.decode(mean[:2])
        pixels = (bare.decode(mean[:2]).sample / 2 + 0.5).clamp(0, 1) * 255
        assert np.abs(image - pixels.permute(0, 2, 3, 1).numpy()).max() <= 0.5 + 1e-3

    # Sampling again gives latents of the stored moments, and whitening gives them mean 0 and standard deviation 1.
    draws = 4000
    noise = torch.randn(draws, *store.shape, generator=torch.Generator().manual_seed(0))
    sampled = torch.addcmul(mean[5], std[5], noise)
    error = (sampled.mean(0) - mean[5]) / (std[5] / draws**0.5)
    assert abs(float(error.std()) - 1) < 0.05
    torch.testing.assert_close(sampled.std(0), std[5], rtol=0.06, atol=0)
    shift, scale = store.statistics(range(12))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    white = (torch.addcmul(mean, std, noise) - shift.view(-1, 1, 1)) / scale.view(-1, 1, 1)
    torch.testing.assert_close(white.mean((0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(white.std((0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)

    told = json.loads((tmp_path / "told.json").read_text())
    assert told["floor"]["patches"] == 4
    assert told["floor"]["fd"] is None
