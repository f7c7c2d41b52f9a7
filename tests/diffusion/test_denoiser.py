"""The network: diffusers' own, conditions at every block, sizes."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from diffusion_parts import make_denoiser
from parts import small_model

from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions, MetadataConditioner
from latent_medi.diffusion.denoiser import Denoiser, build_unet
from latent_medi.diffusion.settings import ModelSettings
from latent_medi.metadata.schema import Field, Schema

ROWS = [
    {"grade": "gleason4", "site": "radboud", "gender": "male", "age": 65.0},
    {"grade": "benign", "site": "karolinska", "gender": "unknown", "age": "unknown"},
]


def noisy(count: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([17, 900][:count])


def test_zero_conditions_reproduce_the_unconditional_network_bit_for_bit(schema):
    x, t = noisy()
    plain = make_denoiser(None, seed=3)
    conditional = make_denoiser(schema, seed=4)
    conditional.unet.load_state_dict(plain.unet.state_dict(), strict=True)
    conditions = Conditions.from_schema(schema, ROWS)
    with torch.no_grad():
        expected = plain(x, t)
        assert not torch.equal(conditional(x, t, conditions), expected)
        conditional.conditioner.zero_init()
        assert torch.equal(conditional(x, t, conditions), expected)
        assert torch.equal(conditional(x, t, conditions.null_like()), expected)


@pytest.mark.parametrize("metadata", [0, 1, 3])
def test_every_block_is_given_the_timestep_plus_the_conditions(metadata):
    fields = [Field("grade", "class", ("a", "b", "c"))]
    fields += [Field(f"m{i}", "categorical", ("x", "y")) for i in range(metadata)]
    schema = Schema(tuple(fields[::-1]))  # the class is moved to the front
    settings = ModelSettings(
        block_out_channels=[20, 40],
        layers_per_block=1,
        attention=[False, False],
        mid_attention=False,
        norm_num_groups=4,
    )
    width = 4 * 20
    unet = build_unet(settings, 4, 8, conditional=True)
    assert type(unet) is UNet2DModel
    denoiser = Denoiser(unet, MetadataConditioner(schema.to_dict(), width)).eval()
    conditions = Conditions.from_schema(schema, [{f.name: f.values[-1] for f in schema.fields}])
    seen = []
    blocks = [m for m in unet.modules() if type(m).__name__ == "ResnetBlock2D"]
    for block in blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    x, t = noisy(1)
    with torch.no_grad():
        denoiser(x, t, conditions)
        each = width // (1 + metadata)
        tables = [m.codes.weight for m in denoiser.conditioner.embeddings.values()]
        assert [w.shape[1] for w in tables] == [each + width - each * (1 + metadata)] + [each] * metadata
        assert len(tables[0]) == 5  # the class: null, unknown, a, b, c
        z_cond = torch.cat([w[-1] for w in tables])
        z_t = unet.time_embedding(unet.time_proj(t))
    assert len(seen) == len(blocks) == 8
    for embedding in seen:
        assert torch.equal(embedding, z_t + z_cond)


def test_an_unconditional_network_takes_no_conditions_and_the_other_must_have_some(schema):
    x, t = noisy()
    with pytest.raises(ValueError, match="give conditions"):
        make_denoiser(schema)(x, t)
    with pytest.raises(ValueError, match="unconditional"):
        make_denoiser(None)(x, t, Conditions.from_schema(schema, ROWS))
    with pytest.raises(ValueError, match="conditioner"):
        Denoiser(build_unet(small_model(), 4, 8, conditional=True), None)


@pytest.mark.parametrize(("preset", "low", "high"), [("S", 92.5, 94), ("B", 209, 211), ("L", 300, 450)])
def test_presets_have_the_promised_size(preset, low, high):
    with torch.device("meta"):
        unet = build_unet(ModelSettings(preset=preset), 4, 32, conditional=True)
    assert low < sum(p.numel() for p in unet.parameters()) / 1e6 < high
    attended = [type(b).__name__.startswith("Attn") for b in unet.down_blocks]
    assert attended == [False, True, True, True]  # at 16, 8 and 4
    assert unet.mid_block.attentions[0].heads * 64 == unet.config["block_out_channels"][-1]
    assert unet.config["resnet_time_scale_shift"] == "scale_shift"


def test_networks_that_cannot_be_built_are_refused_with_the_reason():
    with pytest.raises(UserError, match="64 does not divide the attention width 96"):
        build_unet(ModelSettings(block_out_channels=[64, 96], attention=[False, True]), 4, 16, True)
    with pytest.raises(UserError, match="64 does not divide the attention width 96"):  # of the middle block
        build_unet(ModelSettings(block_out_channels=[64, 96], attention=[False, False]), 4, 16, True)
    build_unet(ModelSettings(block_out_channels=[64, 96], attention=[False, False], mid_attention=False), 4, 16, True)
    with pytest.raises(UserError, match="halved"):
        build_unet(ModelSettings(block_out_channels=[64, 64, 64]), 4, 18, True)
    with pytest.raises(UserError, match="attention has 1"):
        build_unet(ModelSettings(block_out_channels=[64, 64], attention=[True]), 4, 16, True)
    with pytest.raises(UserError, match="norm_num_groups 32 does not divide the width 48"):
        build_unet(ModelSettings(block_out_channels=[48, 64]), 4, 16, True)
    with pytest.raises(UserError, match="preset"):
        build_unet(ModelSettings(preset="B", block_out_channels=[64, 64]), 4, 16, True)


def test_a_sample_does_not_depend_on_its_neighbours(schema):
    denoiser = make_denoiser(schema)
    x, t = noisy()
    conditions = Conditions.from_schema(schema, ROWS)
    with torch.no_grad():
        together = denoiser(x, t, conditions)
        swapped = denoiser(x.flip(0), t.flip(0), conditions.rows([1, 0]))
    assert torch.equal(together[0], swapped[1])


def test_channels_last_gives_the_same_numbers(schema):
    denoiser = make_denoiser(schema)
    x, t = noisy()
    conditions = Conditions.from_schema(schema, ROWS)
    with torch.no_grad():
        expected = denoiser(x, t, conditions)
        denoiser.unet.to(memory_format=torch.channels_last)
        torch.testing.assert_close(denoiser(x, t, conditions), expected, rtol=1e-4, atol=1e-4)


def test_the_output_is_fp32_under_autocast(schema):
    denoiser = make_denoiser(schema)
    x, t = noisy()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert denoiser(x, t, Conditions.from_schema(schema, ROWS)).dtype == torch.float32
