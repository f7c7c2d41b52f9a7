"""Inversion: the way back is the sampler's way forth, and translation does what is known in closed form."""

from __future__ import annotations

import pytest
import torch
from diffusion_parts import make_denoiser

from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.inversion import ddim_coefficients, first_step_of, invert_latents, translate_latents
from latent_medi.diffusion.objective import Objective, make_scheduler
from latent_medi.diffusion.samplers import make_sampler, sample_latents
from latent_medi.diffusion.settings import GuidanceSettings, ObjectiveSettings, SamplerSettings
from latent_medi.metadata.schema import Schema

OBJECTIVES = {
    "v-zero": ObjectiveSettings(),
    "v-plain": ObjectiveSettings(zero_terminal_snr=False),
    "v-cosine-zero": ObjectiveSettings(schedule="squaredcos_cap_v2"),
    "epsilon": ObjectiveSettings(prediction="epsilon", zero_terminal_snr=False),
    "epsilon-linear": ObjectiveSettings(
        prediction="epsilon", schedule="linear", beta_start=0.0001, beta_end=0.02, zero_terminal_snr=False
    ),
}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
MEANS = torch.tensor([-2.0, 0.5, 3.0])


class Gaussian:
    """The best possible denoiser of data N(mean of its site, spread²) in every dimension."""

    conditioner = None

    def __init__(self, objective: ObjectiveSettings, spread: float) -> None:
        self.objective, self.spread, self.asked = Objective(objective), spread, 0

    def __call__(self, x: torch.Tensor, t: torch.Tensor, site: Conditions) -> torch.Tensor:
        self.asked += 1
        abar = self.objective.alphas_cumprod[t].view(-1, 1, 1, 1).double()
        mean = MEANS[site.codes[:, 0]].view(-1, 1, 1, 1)
        gain = abar.sqrt() * self.spread**2 / (abar * self.spread**2 + 1 - abar)
        x0 = mean + gain * (x - abar.sqrt() * mean)
        noise = (x - abar.sqrt() * x0) / (1 - abar).sqrt()
        wanted = (
            noise if self.objective.settings.prediction == "epsilon" else abar.sqrt() * noise - (1 - abar).sqrt() * x0
        )
        return wanted.float()


def sites(*codes: int) -> Conditions:
    return Conditions(torch.tensor(codes)[:, None], torch.zeros(len(codes), 1))


def ddim(objective: ObjectiveSettings, steps: int):
    return make_sampler(make_scheduler(objective).config, SamplerSettings("ddim", steps))


def drawn(count: int, spread: float = 1.0) -> torch.Tensor:
    return spread * torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


@every_objective
def test_coefficients_are_those_of_the_sampler(objective):
    """diffusers' own step is the reference, from the terminal step down to the clean latent."""
    sampler = ddim(objective, 20)
    x, prediction = drawn(1).double(), drawn(2)[1:].double()
    ends = [*sampler.timesteps[1:].tolist(), None]
    for t, s in zip(sampler.timesteps.tolist(), ends, strict=True):
        alpha_bar_s = 1.0 if s is None else float(sampler.alphas_cumprod[s])
        a, b = ddim_coefficients(float(sampler.alphas_cumprod[t]), alpha_bar_s, objective.prediction)
        expected = sampler.step(prediction, t, x, return_dict=False)[0]
        torch.testing.assert_close(a * x + b * prediction, expected, rtol=1e-5, atol=1e-5)


@every_objective
@pytest.mark.parametrize("strength", [0.05, 0.5, 1.0])
def test_back_and_forth_under_the_same_conditions_returns_the_latent(objective, strength):
    """A linear denoiser: the fixed point is reached, and the round trip is exact but for rounding."""
    denoiser, sampler, site = Gaussian(objective, 0.7), ddim(objective, 50), sites(0, 1, 2)
    latents = drawn(3, 0.7) + MEANS.view(-1, 1, 1, 1)
    first = first_step_of(strength, 50)
    noisy = invert_latents(denoiser, site, latents, sampler, first, refinements=30)
    again = sample_latents(denoiser, site, noisy, sampler, first_step=first)
    torch.testing.assert_close(again, latents, rtol=0, atol=2e-4)
    if strength == 1.0:  # to the noise of the data: standard normal where the schedule ends in pure noise
        rest = float(sampler.alphas_cumprod[-1])
        expected = (rest * 0.7**2 + 1 - rest) ** 0.5
        assert (noisy - rest**0.5 * MEANS.view(-1, 1, 1, 1)).std().item() == pytest.approx(expected, rel=0.15)


@every_objective
@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_translation_of_a_gaussian_is_known_in_closed_form(objective, strength):
    """Sites that differ in their mean only. Back to ᾱ and forth, the ODE moves a latent by the share
    1 − √ᾱ·σ/√(ᾱσ²+1−ᾱ) of the difference of the means: all of it from pure noise, and the residual is kept.
    """
    spread, steps = 0.6, 500
    denoiser, sampler = Gaussian(objective, spread), ddim(objective, steps)
    source, target = sites(0, 1, 2), sites(2, 2, 0)
    latents = drawn(3, spread) + MEANS[source.codes[:, 0]].view(-1, 1, 1, 1)
    out = translate_latents(denoiser, source, target, latents, sampler, strength, refinements=3)
    abar = float(sampler.alphas_cumprod[sampler.timesteps[first_step_of(strength, steps)]])
    share = 1 - abar**0.5 * spread / (abar * spread**2 + 1 - abar) ** 0.5
    moved = share * (MEANS[target.codes[:, 0]] - MEANS[source.codes[:, 0]])
    torch.testing.assert_close(out - latents, moved.view(-1, 1, 1, 1).expand_as(out), rtol=0, atol=0.05)
    if strength == 1.0 and objective.zero_terminal_snr:
        assert share == 1.0
        means = out.mean((1, 2, 3)) - latents.mean((1, 2, 3)) + MEANS[source.codes[:, 0]]
        torch.testing.assert_close(means, MEANS[target.codes[:, 0]], rtol=0, atol=0.02)


@every_objective
def test_refinements_bring_a_network_s_round_trip_closer(objective, schema: Schema):
    denoiser, sampler = make_denoiser(schema), ddim(objective, 10)
    strength = 1.0
    if objective.prediction == "epsilon":
        strength = 0.5  # beyond, what is left of an error is divided by a √ᾱ near 0
        # Refining is a fixed-point iteration, and comes to an end where the step changes less than what it is asked
        # about. A trained network's ε does; random weights ask for less of it.
        with torch.no_grad():
            denoiser.unet.conv_out.weight.mul_(0.1)
    conditions = Conditions.from_schema(
        schema, [{"grade": "gleason3", "site": "karolinska", "gender": "male", "age": "60"}] * 2
    )
    latents = drawn(2)
    errors = []
    for refinements in (0, 1, 3, 12):
        again = translate_latents(denoiser, conditions, conditions, latents, sampler, strength, refinements)
        errors.append((again - latents).square().mean().sqrt().item())
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-3 * errors[0], errors


def test_the_least_strength_is_one_step_and_changes_little():
    objective = ObjectiveSettings()
    latents = drawn(1) + MEANS[0]
    changes = []
    for strength in (1e-6, 0.1, 0.5, 1.0):
        denoiser = Gaussian(objective, 1.0)
        out = translate_latents(denoiser, sites(0), sites(2), latents, ddim(objective, 100), strength, refinements=0)
        assert denoiser.asked == 2 * max(1, round(100 * strength))
        changes.append((out - latents).abs().max().item())
    assert changes == sorted(changes)
    assert changes[0] < 0.1 < changes[-1]


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan")])
def test_strength_outside_its_range_is_refused(strength):
    with pytest.raises(UserError, match="up to 1"):
        first_step_of(strength, 50)


def test_one_step_from_pure_noise_is_refused():
    with pytest.raises(UserError, match="at least 2 steps"):
        first_step_of(0.5, 1)


def test_guidance_acts_on_the_way_forth_only(schema: Schema):
    denoiser, sampler = make_denoiser(schema), ddim(ObjectiveSettings(), 10)
    row = {"grade": "gleason3", "site": "karolinska", "gender": "male", "age": "60"}
    source = Conditions.from_schema(schema, [row])
    target = Conditions.from_schema(schema, [{**row, "site": "radboud"}])
    latents = drawn(1)
    asked = {"none": None, "one": GuidanceSettings("chain"), "three": GuidanceSettings("chain", scale=3.0)}
    out = {n: translate_latents(denoiser, source, target, latents, sampler, 0.5, 1, g) for n, g in asked.items()}
    assert torch.equal(out["none"], out["one"])
    noisy = invert_latents(denoiser, source, latents, sampler, 5, 1)
    by_hand = sample_latents(denoiser, target, noisy, sampler, asked["three"], first_step=5)
    assert torch.equal(out["three"], by_hand)
    assert not torch.equal(out["three"], out["one"])


def test_what_was_never_trained_is_refused_before_anything_is_computed(schema: Schema):
    patterns = {"keep_all": 1.0, "all_null": 0.0, "metadata_null": 0.0, "independent": 0.0, "independent_rate": 0.5}
    denoiser, sampler = make_denoiser(schema, patterns=patterns), ddim(ObjectiveSettings(), 10)
    row = {"grade": "gleason3", "site": "karolinska", "gender": "male", "age": "60"}
    whole, partly = (Conditions.from_schema(schema, [r]) for r in (row, {"grade": "gleason3"}))
    with pytest.raises(UserError, match="never trained"):
        translate_latents(denoiser, partly, whole, drawn(1), sampler, 0.5)
    with pytest.raises(UserError, match="never trained"):
        translate_latents(denoiser, whole, whole, drawn(1), sampler, 0.5, guidance=GuidanceSettings("chain", scale=2.0))


def test_wrong_use_is_told():
    objective = ObjectiveSettings()
    denoiser, sampler = Gaussian(objective, 1.0), ddim(objective, 10)
    with pytest.raises(ValueError, match="Only DDIM"):
        invert_latents(denoiser, sites(0), drawn(1), make_sampler(make_scheduler(objective).config, SamplerSettings()))
    with pytest.raises(ValueError, match="fp32"):
        invert_latents(denoiser, sites(0), drawn(1).bfloat16(), sampler)
    with pytest.raises(ValueError, match="first_step 10 of 10"):
        invert_latents(denoiser, sites(0), drawn(1), sampler, 10)
