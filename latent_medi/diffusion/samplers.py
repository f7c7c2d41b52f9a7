"""Sampling of latents from noise: the samplers, the objectives they support, and the loop that they share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.denoiser import Denoiser
from latent_medi.diffusion.guidance import FieldGuidance, Guidance, check_guidance, evaluations
from latent_medi.diffusion.objective import clean_latent, make_scheduler, noise_schedule, settings_of
from latent_medi.diffusion.settings import GuidanceSettings, ObjectiveSettings, SamplerSettings
from latent_medi.metadata.schema import Schema

StepCallback = Callable[[float, torch.Tensor, torch.Tensor], None]
"""Called at each evaluation of the network with ᾱ, the noisy latent x_t and the x₀ that the prediction stands for, fp32
[N, C, h, w] each."""

StepEnd = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Called after each evaluation with its number, its timestep and the latents fp32 [N, C, h, w], which are those of
diffusers' scheduler (x_t/√ᾱ for Euler and Heun); returns the latents to go on with."""

_FAINT = 1e-6
"""ᾱ below which an ε prediction contains almost no information about x₀."""


class _DDIM(DDIMScheduler):
    """DDIM whose fresh noise never exceeds the noise level at the end of a step.

    From ᾱ_t = 0 with η = 1 the two are equal, σ² = 1 − ᾱ_s, and rounding up would make √(1 − ᾱ_s − σ²) NaN.

    Attributes:
        eta: Share of fresh noise per step, 0 to 1.
    """

    eta = 0.0

    def _get_variance(self, timestep: int, prev_timestep: int) -> torch.Tensor:
        variance = super()._get_variance(timestep, prev_timestep)
        room = 1 - (self.alphas_cumprod[prev_timestep] if prev_timestep >= 0 else self.final_alpha_cumprod)
        while room - (variance**0.5) ** 2 < 0:
            variance = torch.nextafter(variance, torch.zeros_like(variance))
        return variance


_KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
    "ddim": (_DDIM, {}),
    "ddpm": (DDPMScheduler, {}),
}

SAMPLERS: tuple[str, ...] = tuple(_KINDS)
"""Names of the samplers."""


def refusal(objective: ObjectiveSettings, sampler: SamplerSettings) -> str:
    """Why a sampler cannot be used with an objective; empty if it can be used.

    | objective                        | dpmpp_2m, _sde, unipc, euler | heun      | ddim                | ddpm        |
    |----------------------------------|------------------------------|-----------|---------------------|-------------|
    | v, linear or scaled_linear       | any steps                    | any steps | steps that divide T | any steps   |
    | v, cosine or zero terminal SNR   | any steps                    | refused   | steps that divide T | any steps   |
    | ε, linear or scaled_linear       | any steps                    | any steps | steps that divide T | any steps   |
    | ε, cosine (terminal ᾱ of 2e-9)   | refused                      | refused   | refused             | all T steps |
    | ε, zero terminal SNR             | refused                      | refused   | refused             | refused     |

    Heun's correction is multiplied by the length of its first step in σ = √((1−ᾱ)/ᾱ), which is thousands if ᾱ ends near
    0. DDIM uses T // steps as the distance to the previous timestep, which is wrong unless steps divides T.
    """
    total, steps = objective.timesteps, sampler.steps
    if not 1 <= steps <= total:
        return f"steps must be between 1 and the {total} training timesteps, not {steps}"
    if sampler.eta and sampler.name != "ddim":
        return f"eta = {sampler.eta} needs ddim"
    if objective.prediction == "epsilon":
        if objective.zero_terminal_snr:
            return "an ε prediction has no x₀ at a terminal SNR of zero (0/0); train with v_prediction"
        terminal = float(noise_schedule(objective)[-1])
        if terminal < _FAINT and not (sampler.name == "ddpm" and steps == total):
            return (
                f"the schedule ends at ᾱ = {terminal:.0e}, so an ε prediction would be divided by {terminal**0.5:.0e}: "
                f"use ddpm with all {total} steps, or train with v_prediction"
            )
    if sampler.name == "heun" and (terminal := float(noise_schedule(objective)[-1])) < _FAINT:
        return (
            f"the schedule ends at ᾱ = {terminal:.0e}, and heun multiplies its correction by the length of the first "
            "step in noise, which is then thousands: use dpmpp_2m or euler"
        )
    if sampler.name == "ddim" and total % steps:
        below = next(d for d in range(steps, 0, -1) if total % d == 0)
        above = next(d for d in range(steps, total + 1) if total % d == 0)
        return (
            f"ddim steps must divide the {total} training timesteps, or steps end between the visited timesteps: use "
            f"{below} or {above} instead of {steps}, or dpmpp_2m"
        )
    return ""


def check_sampler(objective: ObjectiveSettings, sampler: SamplerSettings) -> None:
    """Refuse a sampler that does not support an objective.

    Raises:
        UserError: Gives the reason.
    """
    if reason := refusal(objective, sampler):
        raise UserError(f"The sampler {sampler.name!r} cannot be used here: {reason}.")


def scheduler_of(objective: ObjectiveSettings, name: str) -> Any:
    """The scheduler of diffusers that a sampler is, without timesteps."""
    kind, options = _KINDS[name]
    return kind.from_config(make_scheduler(objective).config, **options)


def sampler_name(scheduler: Any, objective: ObjectiveSettings) -> str:
    """The name of the sampler that a scheduler of diffusers is.

    Raises:
        UserError: It is none of ours, or has an option that a sampler here does not have, such as another noise
            schedule than that of the training.
    """
    if not isinstance(scheduler, SchedulerMixin):
        raise UserError(
            f"A scheduler is an object of diffusers, not {scheduler!r}.",
            "Write pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config), for example.",
        )
    kind, config = type(scheduler), dict(getattr(scheduler, "config", {}))
    names = [name for name, (known, _) in _KINDS.items() if issubclass(known, kind)]
    if not names:
        classes = {DDIMScheduler.__name__ if known is _DDIM else known.__name__ for known, _ in _KINDS.values()}
        raise UserError(f"There is no sampler of {kind.__name__} here.", f"Use one of {', '.join(sorted(classes))}.")
    algorithm = config.get("algorithm_type")
    name = next((name for name in names if _KINDS[name][1].get("algorithm_type") == algorithm), names[0])
    fixed, options = scheduler_of(objective, name).config, inspect.signature(kind.__init__).parameters
    other = [key for key in options if key in fixed and repr(config.get(key)) != repr(fixed[key])]
    if other:
        listed = ", ".join(f"{key}={config.get(key)!r} (here {fixed[key]!r})" for key in other)
        raise UserError(
            f"The noise schedule of the training and the options of a sampler are fixed, but {kind.__name__} has "
            f"{listed[:500]}.",
            f"Write {kind.__name__}.from_config(pipe.scheduler.config), or sampler={name!r} in a call.",
        )
    return name


def make_sampler(scheduler_config: Any, settings: SamplerSettings) -> Any:
    """A diffusers scheduler with its timesteps set: the first is the terminal one, and each step ends at the next.

    Args:
        scheduler_config: The configuration in the model's ``scheduler/``.
        settings: Name and steps of the sampler.

    Raises:
        UserError: The sampler does not support the objective, with the reason.
    """
    objective = settings_of(scheduler_config)
    check_sampler(objective, settings)
    scheduler = scheduler_of(objective, settings.name)
    if isinstance(scheduler, _DDIM):
        scheduler.eta = settings.eta
    scheduler.set_timesteps(settings.steps)
    visited = [round(float(t)) for t in scheduler.timesteps]
    if isinstance(scheduler, HeunDiscreteScheduler):  # it visits each timestep but the first twice
        visited = visited[:1] + visited[1::2]
    falling = all(a > b for a, b in pairwise(visited))
    if len(visited) != settings.steps or visited[0] != objective.timesteps - 1 or not falling:
        raise UserError(
            f"The sampler {settings.name!r} cannot make {settings.steps} even steps.", "Use another number of steps."
        )
    return scheduler


def draw_noise(
    seeds: Sequence[int | torch.Generator], shape: Sequence[int]
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """The initial noise of each sample, from its own seed, and its generator for the noise of later steps.

    Args:
        seeds: N seeds, 0 to 2^63 − 1, or generators.
        shape: (C, h, w).

    Returns:
        fp32 [N, C, h, w] and N generators, all on the CPU (but for given generators), so that every device gives the
        same samples.
    """
    generators = [s if isinstance(s, torch.Generator) else torch.Generator().manual_seed(int(s)) for s in seeds]
    noise = [torch.randn(tuple(shape), generator=each, device=each.device).cpu() for each in generators]
    return (torch.stack(noise) if noise else torch.empty(0, *shape)), generators


def draws_noise(sampler: Any) -> bool:
    """Whether a sampler adds fresh noise at its steps, and so needs a generator per sample."""
    if isinstance(sampler, _DDIM):
        return sampler.eta > 0
    return isinstance(sampler, DDPMScheduler) or str(sampler.config.get("algorithm_type")).startswith("sde")


def _prepare(sampler: Any, first_step: int, device: torch.device) -> tuple[list[Any], torch.Tensor]:
    """Reset a sampler's state; its timesteps from ``first_step`` on, and ᾱ of each."""
    sampler.set_timesteps(sampler.num_inference_steps)
    unipc: Any = sampler if isinstance(sampler, UniPCMultistepScheduler) else None
    if unipc is not None:
        unipc.sigmas = unipc.sigmas.to(device)  # otherwise it copies six of them at every step
    if isinstance(sampler, HeunDiscreteScheduler):
        first_step *= 2  # a step and its correction
    timesteps = list(sampler.timesteps)[first_step:]
    if hasattr(sampler, "set_begin_index"):
        sampler.set_begin_index(first_step)
    alphas_cumprod = noise_schedule(settings_of(sampler.config))
    return timesteps, alphas_cumprod[torch.tensor([round(float(t)) for t in timesteps], dtype=torch.long)]


def network_evaluations(
    objective: ObjectiveSettings, sampler: SamplerSettings, guidance: GuidanceSettings, schema: Schema
) -> int:
    """Evaluations of the network for one image: one per step, and inside the guidance interval one per branch.

    Raises:
        UserError: The sampler does not support the objective, or the guidance does not fit the fields.
    """
    _, alphas = _prepare(make_sampler(make_scheduler(objective).config, sampler), 0, torch.device("cpu"))
    branches, (low, high) = evaluations(guidance, schema), guidance.interval
    return sum(branches if low <= alpha_bar <= high else 1 for alpha_bar in alphas.tolist())


@contextmanager
def low_precision(device: torch.device, dtype: torch.dtype | None, networks: Sequence[nn.Module]) -> Iterator[None]:
    """Autocast around all steps of some networks, which casts each weight once; none if ``dtype`` is ``None``.

    Autocast drops the cast weights when it ends, so one autocast per step would cast them at every step. It caches only
    weights that require a gradient, so frozen ones are marked as such inside the context.
    """
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        frozen = [p for network in networks for p in network.parameters()] if dtype is not None else []
        frozen = [p for p in frozen if p.is_floating_point() and not p.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    conditions: Conditions | None,
    noise: torch.Tensor,
    sampler: Any,
    guidance: Guidance | GuidanceSettings | None = None,
    generators: Sequence[torch.Generator] | None = None,
    first_step: int = 0,
    dtype: torch.dtype | None = None,
    callback: StepCallback | None = None,
    step_end: StepEnd | None = None,
) -> torch.Tensor:
    """Run a sampler.

    Args:
        denoiser: In eval mode.
        conditions: Of N samples over the conditioner's fields; ``None`` for an unconditional model.
        noise: fp32 [N, C, h, w]; drawn per sample from its own seed, so that a sample does not depend on its batch.
            With ``first_step`` the noisy latent at that step's timestep.
        sampler: From :func:`make_sampler`; may be used again.
        guidance: What guides the samples; ``None`` is the conditional model.
        generators: One per sample, for samplers that add noise at each step.
        first_step: Number of leading steps to leave out, for starting from a noised image.
        dtype: Arithmetic inside the network, bf16 or fp16; ``None`` is that of its weights. The sampler's own is fp32.
        callback: Called at each evaluation.
        step_end: Called after each evaluation.

    Returns:
        fp32 [N, C, h, w]; clean whitened latents.

    Raises:
        UserError: Guidance that the model was not trained for.
        ValueError: The sampler adds noise and has no generator per sample.
    """
    draws = draws_noise(sampler)
    if draws and (generators is None or len(generators) != len(noise)):
        raise ValueError("This sampler adds noise at each step: give one generator per sample.")
    guidance = Guidance.of(guidance)
    weak, classifier = guidance.weak, guidance.classifier
    check_guidance(guidance.fields, denoiser.conditioner, conditions)
    timesteps, alphas = _prepare(sampler, first_step, noise.device)
    # Euler's and Heun's state is x/√ᾱ = x₀ + σε.
    euler = isinstance(sampler, (EulerDiscreteScheduler, HeunDiscreteScheduler))
    x = noise * (sampler.sigmas[-len(timesteps) - 1] ** 2 + 1).sqrt() if euler else noise
    options: dict[str, Any] = {"generator": list(generators)} if draws and generators is not None else {}
    if isinstance(sampler, _DDIM):
        options["eta"] = sampler.eta
    predicts, guide = sampler.config["prediction_type"], FieldGuidance(denoiser, conditions, guidance.fields)
    networks = [denoiser, *([] if weak is None else [weak.denoiser])]
    full = torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=False)
    with low_precision(x.device, dtype, networks):
        for number, (t, alpha_bar) in enumerate(zip(timesteps, alphas.tolist(), strict=True)):
            with full:
                x_t = sampler.scale_model_input(x, t)
            step = torch.full((len(x),), round(float(t)), dtype=torch.long, device=x.device)
            prediction = guide(x_t, step, alpha_bar)
            if weak is not None:
                prediction = weak.guide(prediction, x_t, step, conditions, alpha_bar)
            with full:
                if classifier is not None:
                    prediction = classifier.guide(prediction, x_t, step, alpha_bar, predicts)
                if callback is not None:
                    callback(alpha_bar, x_t, clean_latent(prediction, x_t, alpha_bar, predicts))
                x = sampler.step(prediction, t, x, return_dict=False, **options)[0]
                x = x if step_end is None else step_end(number, t, x)
    return x
