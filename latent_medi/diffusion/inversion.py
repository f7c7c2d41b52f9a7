"""DDIM inversion: from a latent to the noise that DDIM would turn into it, and translation to other conditions.

DDIM without fresh noise maps x_t to the next less noisy x_s, linearly in x_t and the prediction. Solved for x_t, it
runs backwards. Backwards under the conditions of one hospital and forwards under those of another, it changes what the
conditions determine and keeps what the noise determines.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMScheduler

from latent_medi.core.device import exact_fp32
from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.guidance import check_guidance
from latent_medi.diffusion.samplers import sample_latents
from latent_medi.diffusion.settings import GuidanceSettings


def ddim_coefficients(alpha_bar_t: float, alpha_bar_s: float, prediction_type: str) -> tuple[float, float]:
    """(a, b) of the DDIM step x_s = a·x_t + b·prediction(x_t, t), from ᾱ_t to the larger ᾱ_s.

    Song et al. 2021 (arXiv 2010.02502), equation 12 with σ = 0, with x₀ and ε expressed by the prediction. For v, no
    term is divided by √ᾱ_t, so a step from ᾱ_t = 0 is exact: with ᾱ = cos²φ the step is a rotation by φ_t − φ_s
    (Salimans & Ho 2022, arXiv 2202.00512, appendix D).
    """
    signal_t, noise_t = alpha_bar_t**0.5, (1 - alpha_bar_t) ** 0.5
    signal_s, noise_s = alpha_bar_s**0.5, (1 - alpha_bar_s) ** 0.5
    if prediction_type == "v_prediction":
        return signal_s * signal_t + noise_s * noise_t, noise_s * signal_t - signal_s * noise_t
    return signal_s / signal_t, noise_s - signal_s * noise_t / signal_t


def first_step_of(strength: float, steps: int) -> int:
    """Number of leading sampler steps to leave out, so that ``strength`` is the share of steps that remain, at least 1.

    Raises:
        UserError: The strength is outside (0, 1], or there are fewer than 2 steps: a single one starts at pure noise.
    """
    if not 0 < strength <= 1:
        raise UserError(f"strength must be above 0 (unchanged) and up to 1 (from pure noise), not {strength}.")
    if steps < 2:
        raise UserError(f"Inversion takes at least 2 steps, not {steps}.")
    return steps - max(1, round(strength * steps))


@torch.no_grad()
@exact_fp32()
def invert_latents(
    denoiser: Denoiser,
    conditions: Conditions | None,
    latents: torch.Tensor,
    sampler: DDIMScheduler,
    first_step: int = 0,
    refinements: int = 2,
) -> torch.Tensor:
    """The noisy latents from which DDIM, started at ``first_step`` under the same conditions, yields these latents.

    Each step solves x_s = a·x_t + b·prediction(x_t, t) for x_t by the fixed-point iteration x_t ← (x_s −
    b·prediction(x_t, t)) / a, starting with x_t = x_s. One evaluation is the usual DDIM inversion. Each further one
    brings the round trip closer to the input, as long as b/a times the prediction changes less than x_t. With ε near
    pure noise b/a is about −1, and the iteration may not converge: use v-prediction, or less strength.

    Args:
        denoiser: In eval mode; used without guidance, whose large steps have no stable inverse.
        conditions: Conditions of the N latents; ``None`` for an unconditional model.
        latents: fp32 [N, C, h, w]; clean and whitened.
        sampler: From :func:`~latent_medi.diffusion.samplers.make_sampler` with "ddim".
        first_step: Step of the sampler to stop at: 0 goes all the way to its first timestep.
        refinements: Evaluations of the network per step beyond the first.

    Returns:
        fp32 [N, C, h, w]; for :func:`~latent_medi.diffusion.samplers.sample_latents` with the same ``first_step``.

    Raises:
        ValueError: The sampler is not DDIM, latents are not fp32, or a number is out of range.
        UserError: Conditions that the model was not trained for.
    """
    if not isinstance(sampler, DDIMScheduler):
        raise ValueError(f"Only DDIM runs backwards, not {type(sampler).__name__}.")
    if latents.dtype != torch.float32:
        raise ValueError(f"Latents must be fp32, not {latents.dtype}: rounding errors grow during inversion.")
    ddim: Any = sampler  # whose attributes diffusers makes at run time
    if not 0 <= first_step < len(ddim.timesteps) or refinements < 0:
        raise ValueError(f"first_step {first_step} of {len(ddim.timesteps)}, {refinements} refinements.")
    check_guidance(GuidanceSettings(), denoiser.conditioner, conditions)
    alpha_bar_s, x = float(ddim.final_alpha_cumprod), latents
    for t in reversed(ddim.timesteps[first_step:].tolist()):
        alpha_bar_t = float(ddim.alphas_cumprod[t])
        a, b = ddim_coefficients(alpha_bar_t, alpha_bar_s, ddim.config["prediction_type"])
        step = torch.full((len(x),), t, dtype=torch.long, device=x.device)
        x_t = x
        for _ in range(1 + refinements):
            x_t = (x - b * denoiser(x_t, step, conditions)) / a
        x, alpha_bar_s = x_t, alpha_bar_t
    return x


@exact_fp32()
def translate_latents(
    denoiser: Denoiser,
    source: Conditions | None,
    target: Conditions | None,
    latents: torch.Tensor,
    sampler: Any,
    strength: float,
    refinements: int = 2,
    guidance: GuidanceSettings | None = None,
) -> torch.Tensor:
    """Latents translated to other conditions: backwards under ``source``, forwards under ``target``.

    Args:
        denoiser: In eval mode.
        source: Conditions of the N latents.
        target: Conditions to translate to.
        latents: fp32 [N, C, h, w]; clean and whitened.
        sampler: From :func:`~latent_medi.diffusion.samplers.make_sampler` with "ddim".
        strength: Share of the steps to invert, above 0 and up to 1. Less strength keeps more of the image.
        refinements: See :func:`invert_latents`.
        guidance: Guidance of the forward steps.

    Returns:
        fp32 [N, C, h, w].

    Raises:
        UserError: The strength is outside (0, 1], or the model was not trained for the conditions or guidance.
    """
    guidance = guidance or GuidanceSettings()
    first_step = first_step_of(strength, len(sampler.timesteps))
    check_guidance(guidance, denoiser.conditioner, target)
    noisy = invert_latents(denoiser, source, latents, sampler, first_step, refinements)
    return sample_latents(denoiser, target, noisy, sampler, guidance, first_step=first_step)
