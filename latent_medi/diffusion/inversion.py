"""From an image's latent back to the noise that a sampler would have made it from, and on to another image from there.

DDIM without fresh noise is a map from x_t to the next less noisy x_s, linear in x_t and the prediction. Solved for x_t
it runs backwards; under one hospital's conditions backwards and under another's forwards, it changes what the
conditions decide and keeps what the noise decides.
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

    Song et al. 2021 (arXiv 2010.02502), equation 12 with σ = 0, where x₀ and ε are put in terms of the prediction. For
    v nothing is divided by √ᾱ_t, so that a step from ᾱ_t = 0 is exact: with ᾱ = cos²φ the step is a rotation by
    φ_t − φ_s (Salimans & Ho 2022, arXiv 2202.00512, appendix D).
    """
    signal_t, noise_t = alpha_bar_t**0.5, (1 - alpha_bar_t) ** 0.5
    signal_s, noise_s = alpha_bar_s**0.5, (1 - alpha_bar_s) ** 0.5
    if prediction_type == "v_prediction":
        return signal_s * signal_t + noise_s * noise_t, noise_s * signal_t - signal_s * noise_t
    return signal_s / signal_t, noise_s - signal_s * noise_t / signal_t


def first_step_of(strength: float, steps: int) -> int:
    """Leading sampler steps that a strength leaves out: it is the share of the noise schedule, in whole steps ≥ 1.

    Raises:
        UserError: A strength outside (0, 1], or fewer than 2 steps: a single step from pure noise has lost the image.
    """
    if not 0 < strength <= 1:
        raise UserError(f"The strength is {strength}; it lies above 0 (nothing) and up to 1 (from pure noise).")
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
    """The noisy latents from which DDIM, started at ``first_step`` under the same conditions, makes these latents.

    Each step solves x_s = a·x_t + b·prediction(x_t, t) for x_t by the fixed-point iteration x_t ← (x_s −
    b·prediction(x_t, t)) / a from x_t = x_s on. One evaluation is the usual DDIM inversion; each further one brings the
    round trip closer to the input, as long as b/a times the prediction changes less than x_t does. With ε near pure
    noise b/a is about −1, and refining may not come to an end there: use v-prediction, or less strength.

    Args:
        denoiser: In eval mode; asked without guidance, whose large steps have no stable inverse.
        conditions: What the latents are, of N samples; ``None`` for an unconditional model.
        latents: fp32 [N, C, h, w]; clean and whitened.
        sampler: From :func:`~latent_medi.diffusion.samplers.make_sampler` with "ddim".
        first_step: Step of the sampler to stop at: 0 goes all the way to its first timestep.
        refinements: Evaluations of the network per step beyond the first.

    Returns:
        fp32 [N, C, h, w]; for :func:`~latent_medi.diffusion.samplers.sample_latents` with the same ``first_step``.

    Raises:
        ValueError: Another sampler, latents that are not fp32, or a step or a number that is not there.
        UserError: Conditions that the model was not trained for.
    """
    if not isinstance(sampler, DDIMScheduler):
        raise ValueError(f"Only DDIM runs backwards, not {type(sampler).__name__}.")
    if latents.dtype != torch.float32:
        raise ValueError(f"Latents are fp32, not {latents.dtype}: errors of rounding grow on the way to noise.")
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
    """Latents of samples as they would be under other conditions: backwards under ``source``, forwards under
    ``target``.

    Args:
        denoiser: In eval mode.
        source: What the latents are, of N samples.
        target: What they are to become.
        latents: fp32 [N, C, h, w]; clean and whitened.
        sampler: From :func:`~latent_medi.diffusion.samplers.make_sampler` with "ddim".
        strength: Share of the noise schedule to go back, above 0 and up to 1. The less, the more of the image is kept.
        refinements: See :func:`invert_latents`.
        guidance: Of the way forwards.

    Returns:
        fp32 [N, C, h, w].

    Raises:
        UserError: A strength outside (0, 1], or conditions or guidance that the model was not trained for.
    """
    guidance = guidance or GuidanceSettings()
    first_step = first_step_of(strength, len(sampler.timesteps))
    check_guidance(guidance, denoiser.conditioner, target)
    noisy = invert_latents(denoiser, source, latents, sampler, first_step, refinements)
    return sample_latents(denoiser, target, noisy, sampler, guidance, first_step=first_step)
