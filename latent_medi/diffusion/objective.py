"""The noise schedule, the prediction target, and the weighted loss, in fp32 (the schedule is computed in fp64)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, betas_for_alpha_bar, rescale_zero_terminal_snr

from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.settings import ObjectiveSettings


def noise_schedule(settings: ObjectiveSettings) -> torch.Tensor:
    """ᾱ_t of every timestep, fp32 [T], decreasing; the last is exactly 0 with ``zero_terminal_snr``.

    The rescaling is algorithm 1 of Lin et al. 2024 (arXiv 2305.08891).
    """
    settings.check()
    count, start, end = settings.timesteps, settings.beta_start, settings.beta_end
    if settings.schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif settings.schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    else:
        betas = betas_for_alpha_bar(count).double()
    if settings.zero_terminal_snr:
        betas = rescale_zero_terminal_snr(betas)
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    if settings.zero_terminal_snr:
        alphas_cumprod[-1] = 0.0
    return alphas_cumprod.float()


def make_scheduler(settings: ObjectiveSettings) -> DDPMScheduler:
    """The diffusers scheduler of an objective; a model stores its configuration in ``scheduler/``."""
    settings.check()
    return DDPMScheduler(
        num_train_timesteps=settings.timesteps,
        beta_start=settings.beta_start,
        beta_end=settings.beta_end,
        beta_schedule=settings.schedule,
        prediction_type=settings.prediction,
        rescale_betas_zero_snr=settings.zero_terminal_snr,
        clip_sample=False,  # latents are not confined to [-1, 1]
        timestep_spacing="trailing",
    )


def settings_of(
    config: Any, weighting: str = "min_snr_plus_one", gamma: float = 5.0, loss: str = "l2"
) -> ObjectiveSettings:
    """The objective of a scheduler's configuration, which lacks weighting and loss.

    Raises:
        UserError: Its prediction type or schedule is not supported.
    """
    values = dict(config)
    if values.get("trained_betas") is not None or values.get("prediction_type", "epsilon") not in (
        "epsilon",
        "v_prediction",
    ):
        raise UserError(
            "The scheduler has betas of its own or predicts x₀; only ε and v on a named schedule are supported."
        )
    return ObjectiveSettings(
        prediction=values.get("prediction_type", "epsilon"),
        schedule=values.get("beta_schedule", "linear"),
        beta_start=values.get("beta_start", 0.0001),
        beta_end=values.get("beta_end", 0.02),
        timesteps=values.get("num_train_timesteps", 1000),
        zero_terminal_snr=bool(values.get("rescale_betas_zero_snr", False)),
        weighting=weighting,  # type: ignore[arg-type]
        gamma=gamma,
        loss=loss,  # type: ignore[arg-type]
    )


class Objective:
    """A noise schedule, a prediction and a weighting, as tables over the timesteps.

    Args:
        settings: The objective.

    Attributes:
        alphas_cumprod: ᾱ, fp32 [T].
        weights: Loss weight of each timestep, fp32 [T].
    """

    def __init__(self, settings: ObjectiveSettings) -> None:
        self.settings = settings
        self.alphas_cumprod = noise_schedule(settings)
        self.weights = loss_weights(self.alphas_cumprod, settings)

    @property
    def timesteps(self) -> int:
        """Number of noise levels T."""
        return self.settings.timesteps

    def _at(self, table: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return table.to(t.device)[t].view(-1, *[1] * (like.ndim - 1))

    def _on(self, device: torch.device) -> None:
        if self.alphas_cumprod.device != device:  # once, not at every step
            self.alphas_cumprod, self.weights = self.alphas_cumprod.to(device), self.weights.to(device)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε, fp32 [N, C, h, w], for t int64 [N].

        Raises:
            ValueError: An input is not fp32; bf16 has too few digits for the noise of small t.
        """
        if x0.dtype != torch.float32 or noise.dtype != torch.float32:
            raise ValueError(
                f"Latents and noise must be fp32, not {x0.dtype} and {noise.dtype}: bf16 loses the noise at small t."
            )
        self._on(x0.device)
        alpha_bar = self._at(self.alphas_cumprod, t, x0)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The target of the prediction: v = √ᾱ_t·ε − √(1−ᾱ_t)·x₀ (Salimans & Ho 2022, arXiv 2202.00512), or ε."""
        if self.settings.prediction == "epsilon":
            return noise
        self._on(x0.device)
        alpha_bar = self._at(self.alphas_cumprod, t, x0)
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Loss weight of timesteps int64 [N], fp32 [N]."""
        self._on(t.device)
        return self.weights[t]


def clean_latent(
    prediction: torch.Tensor, x_t: torch.Tensor, alpha_bar: torch.Tensor | float, prediction_type: str
) -> torch.Tensor:
    """The x₀ that a prediction at ᾱ stands for: (x_t − √(1−ᾱ)·ε)/√ᾱ, or √ᾱ·x_t − √(1−ᾱ)·v."""
    if prediction_type == "epsilon":
        return (x_t - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar**0.5
    return alpha_bar**0.5 * x_t - (1 - alpha_bar) ** 0.5 * prediction


def loss_weights(alphas_cumprod: torch.Tensor, settings: ObjectiveSettings) -> torch.Tensor:
    """Weight of the error of the prediction at each timestep, fp32 [T], finite at zero signal.

    "min_snr_plus_one" is min(snr+1, γ+1)/(snr+1). Plain min-SNR for v (Hang et al. 2023, arXiv 2303.09556) is 0 at the
    noisiest steps, which determine overall colour.
    """
    alpha_bar = alphas_cumprod.double()
    snr = alpha_bar / (1 - alpha_bar)
    if settings.weighting == "uniform":
        weights = torch.ones_like(snr)
    elif settings.weighting == "min_snr_plus_one":
        weights = (snr.clamp(max=settings.gamma) + 1) / (snr + 1)
    elif settings.prediction == "epsilon":
        weights = (settings.gamma / snr).clamp(max=1.0)  # min(snr, γ)/snr, in a form that allows snr = 0
    else:
        weights = snr.clamp(max=settings.gamma) / (snr + 1)
    return weights.float()


def diffusion_loss(
    denoiser: Callable[..., torch.Tensor],
    x0: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    conditions: Conditions | None,
    objective: Objective,
) -> torch.Tensor:
    """Weighted loss of each sample, fp32 [N]: mean over its latent of the squared (or absolute) error.

    Args:
        denoiser: ``denoiser(x_t, t, conditions)``, possibly wrapped for several devices or autocast.
        x0: fp32 [N, C, h, w]; whitened latents.
        noise: fp32 [N, C, h, w].
        t: int64 [N].
        conditions: Of N samples, dropout applied; ``None`` for an unconditional model.
        objective: Schedule, prediction and weighting.
    """
    prediction = denoiser(objective.add_noise(x0, noise, t), t, conditions).float()
    error = prediction - objective.target(x0, noise, t)
    each = error.abs() if objective.settings.loss == "l1" else error.square()
    return each.flatten(1).mean(1) * objective.weight(t)
