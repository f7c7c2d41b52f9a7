"""Schedule, target, weights and loss against formulas written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler

from latent_medi.core.errors import UserError
from latent_medi.diffusion.objective import (
    Objective,
    clean_latent,
    diffusion_loss,
    make_scheduler,
    noise_schedule,
    settings_of,
)
from latent_medi.diffusion.settings import ObjectiveSettings

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
T = torch.tensor([0, 1, 250, 998, 999])


def latents(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.randn(count, 4, 8, 8, generator=generator)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero", [True, False])
def test_the_schedule_is_diffusers_own_and_ends_at_pure_noise(schedule, zero):
    settings = ObjectiveSettings(schedule=schedule, zero_terminal_snr=zero)
    ours, theirs = noise_schedule(settings), make_scheduler(settings).alphas_cumprod
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=5e-5, atol=1e-9)
    assert bool((ours[1:] < ours[:-1]).all())
    assert (ours[-1] == 0) == zero
    assert ours[0] > 0.998


def test_scaled_linear_by_hand():
    ours = noise_schedule(ObjectiveSettings(zero_terminal_snr=False))
    betas = [(math.sqrt(0.00085) + i / 999 * (math.sqrt(0.012) - math.sqrt(0.00085))) ** 2 for i in range(1000)]
    assert ours[-1].item() == pytest.approx(math.prod(1 - b for b in betas), rel=1e-6)


def test_zero_terminal_rescaling_by_hand():
    plain = noise_schedule(ObjectiveSettings(zero_terminal_snr=False)).double().sqrt()
    expected = (plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])
    torch.testing.assert_close(noise_schedule(ObjectiveSettings()).double().sqrt(), expected, rtol=1e-5, atol=1e-8)


def test_noisy_latent_and_targets_by_hand():
    x0, noise = latents()
    objective = Objective(ObjectiveSettings())
    a = objective.alphas_cumprod[T].sqrt().view(-1, 1, 1, 1)
    s = (1 - objective.alphas_cumprod[T]).sqrt().view(-1, 1, 1, 1)
    x_t, v = objective.add_noise(x0, noise, T), objective.target(x0, noise, T)
    torch.testing.assert_close(x_t, a * x0 + s * noise)
    torch.testing.assert_close(v, a * noise - s * x0)
    assert torch.equal(x_t[-1], noise[-1])  # the terminal step is pure noise
    assert torch.equal(v[-1], -x0[-1])  # and its target is the image
    torch.testing.assert_close(clean_latent(v, x_t, a**2, "v_prediction"), x0, atol=1e-5, rtol=1e-5)
    epsilon = Objective(ObjectiveSettings(prediction="epsilon", zero_terminal_snr=False))
    assert epsilon.target(x0, noise, T) is noise
    alpha_bar, x_t = epsilon.alphas_cumprod[T].view(-1, 1, 1, 1), epsilon.add_noise(x0, noise, T)
    torch.testing.assert_close(clean_latent(noise, x_t, alpha_bar, "epsilon"), x0, atol=1e-4, rtol=1e-4)


def test_small_noise_is_not_lost_and_bf16_is_refused():
    x0, noise = latents()
    objective = Objective(ObjectiveSettings())
    t = torch.zeros(5, dtype=torch.long)
    added = objective.add_noise(x0, noise, t) - objective.alphas_cumprod[0].sqrt() * x0
    assert added.std() == pytest.approx(math.sqrt(1 - objective.alphas_cumprod[0].item()), rel=0.05)
    with pytest.raises(ValueError, match="fp32"):
        objective.add_noise(x0.bfloat16(), noise, t)
    with pytest.raises(ValueError, match="fp32"):
        objective.add_noise(x0, noise.half(), t)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_by_hand_and_finite_at_the_terminal_step(schedule):
    gamma = 5.0
    for weighting in ("min_snr_plus_one", "min_snr", "uniform"):
        objective = Objective(ObjectiveSettings(schedule=schedule, weighting=weighting, gamma=gamma))
        weights = objective.weight(torch.arange(1000))
        assert torch.isfinite(weights).all()
        for t in (0, 100, 500, 999):
            abar = objective.alphas_cumprod[t].item()
            snr = abar / (1 - abar)
            expected = {
                "min_snr_plus_one": min(snr + 1, gamma + 1) / (snr + 1),
                "min_snr": min(snr, gamma) / (snr + 1),
                "uniform": 1.0,
            }[weighting]
            assert weights[t].item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    plus_one = Objective(ObjectiveSettings(schedule=schedule)).weights
    assert plus_one[-1] == 1  # where overall colour is decided
    assert Objective(ObjectiveSettings(schedule=schedule, weighting="min_snr")).weights[-1] == 0


def test_min_snr_of_epsilon_by_hand():
    objective = Objective(ObjectiveSettings(prediction="epsilon", zero_terminal_snr=False, weighting="min_snr"))
    snr = objective.alphas_cumprod.double() / (1 - objective.alphas_cumprod.double())
    torch.testing.assert_close(objective.weights.double(), snr.clamp(max=5) / snr, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("loss", "power"), [("l2", 2), ("l1", 1)])
def test_the_loss_is_one_number_per_sample(loss, power):
    x0, noise = latents()
    objective = Objective(ObjectiveSettings(loss=loss))
    seen = {}

    def denoiser(x_t, t, conditions):
        seen.update(x=x_t, t=t, conditions=conditions)
        return torch.zeros_like(x_t)

    each = diffusion_loss(denoiser, x0, noise, T, None, objective)
    target = objective.target(x0, noise, T)
    expected = target.abs().pow(power).mean((1, 2, 3)) * objective.weight(T)
    assert each.shape == (5,)
    assert each.dtype == torch.float32
    torch.testing.assert_close(each, expected)
    assert torch.equal(seen["x"], objective.add_noise(x0, noise, T))

    def perfect(x_t, t, conditions):
        return target.bfloat16()

    assert diffusion_loss(perfect, x0, noise, T, None, objective).max() < 2e-3


def test_epsilon_with_zero_terminal_snr_is_refused():
    settings = ObjectiveSettings(prediction="epsilon")
    for build in (Objective, make_scheduler, noise_schedule):
        with pytest.raises(UserError, match="zero_terminal_snr"):
            build(settings)


def test_the_objective_survives_the_scheduler_configuration(tmp_path):
    for settings in (
        ObjectiveSettings(),
        ObjectiveSettings(
            prediction="epsilon", schedule="linear", beta_start=1e-4, beta_end=0.02, zero_terminal_snr=False
        ),
    ):
        scheduler = make_scheduler(settings)
        scheduler.save_pretrained(tmp_path)
        loaded = DDPMScheduler.from_pretrained(tmp_path)
        assert settings_of(loaded.config) == settings
        assert loaded.config.clip_sample is False
