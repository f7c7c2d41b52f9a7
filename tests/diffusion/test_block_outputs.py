"""Outputs of a network's blocks: what the network itself computes there, for latents at a noise level."""

from __future__ import annotations

import pytest
import torch
from diffusion_parts import make_denoiser
from parts import make_autoencoder

from latent_medi.core.errors import UserError
from latent_medi.diffusion.block_outputs import block_names, block_outputs
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.settings import ObjectiveSettings
from latent_medi.metadata.schema import Schema


@pytest.fixture(scope="module")
def pipe(schema: Schema) -> MediPipeline:
    return MediPipeline.from_parts(
        make_denoiser(schema), ObjectiveSettings(), make_autoencoder(), torch.zeros(4), torch.ones(4), {}
    )


@pytest.fixture(scope="module")
def latents(pipe: MediPipeline) -> torch.Tensor:
    return torch.randn(5, *pipe.latent_shape, generator=torch.Generator().manual_seed(0))


def test_they_are_what_the_network_computes(pipe: MediPipeline, latents: torch.Tensor) -> None:
    """The rest of the network, run on the outputs of the last block, gives the network's own prediction."""
    names = block_names(pipe)
    found = block_outputs(pipe, latents, 300, blocks=names, seeds=[7, 8, 9, 10, 11], batch=2)
    assert list(found) == names
    assert names[0] == "down_blocks.0"
    assert all(len(output) == 5 for output in found.values())
    noise = torch.stack(
        [torch.randn(pipe.latent_shape, generator=torch.Generator().manual_seed(s)) for s in range(7, 12)]
    )
    alpha_bar = pipe.scheduler.alphas_cumprod[300]
    noisy = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise
    unet = pipe.unet
    with torch.no_grad():
        expected = pipe.denoiser(noisy, torch.full((5,), 300), pipe.conditions([{}] * 5))
        rest = unet.conv_out(unet.conv_act(unet.conv_norm_out(found[names[-1]])))
    torch.testing.assert_close(rest, expected, atol=1e-5, rtol=1e-4)


def test_they_depend_on_noise_level_seed_and_conditions_alone(pipe: MediPipeline, latents: torch.Tensor) -> None:
    (first,) = block_outputs(pipe, latents, 50).values()
    assert torch.equal(first, block_outputs(pipe, latents, 50)["mid_block"])
    assert not pipe.unet.mid_block._forward_hooks
    assert not torch.equal(first, block_outputs(pipe, latents, 51)["mid_block"])
    assert not torch.equal(first, block_outputs(pipe, latents, 50, seeds=[1, 2, 3, 4, 5])["mid_block"])
    asked = pipe.conditions([{"grade": "gleason4", "site": "radboud"}] * 5)
    assert not torch.equal(first, block_outputs(pipe, latents, 50, asked)["mid_block"])


def test_what_there_is_not_is_refused(pipe: MediPipeline, latents: torch.Tensor) -> None:
    with pytest.raises(UserError, match="no block middle"):
        block_outputs(pipe, latents, 0, blocks=["middle"])
    with pytest.raises(UserError, match="not 1000"):
        block_outputs(pipe, latents, 1000)
    with pytest.raises(UserError, match="5 latents and 1 seeds"):
        block_outputs(pipe, latents, 0, seeds=[1])
