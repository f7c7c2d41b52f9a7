"""What the blocks of a trained network compute on noisy latents: features of patches that need no further encoder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from latent_medi.core.device import exact_fp32
from latent_medi.core.errors import UserError
from latent_medi.diffusion.conditioning import Conditions
from latent_medi.diffusion.objective import Objective
from latent_medi.diffusion.pipeline import MediPipeline
from latent_medi.diffusion.samplers import draw_noise


def block_names(pipe: MediPipeline) -> list[str]:
    """The blocks of a model's network, in the order in which they run: "down_blocks.0", …, "mid_block", …"""
    down, up = (
        [f"{name}.{i}" for i in range(len(pipe.unet.get_submodule(name)._modules))]
        for name in ("down_blocks", "up_blocks")
    )
    return [*down, "mid_block", *up]


@torch.no_grad()
@exact_fp32()
def block_outputs(
    pipe: MediPipeline,
    latents: torch.Tensor,
    timestep: int,
    conditions: Conditions | None = None,
    blocks: Sequence[str] = ("mid_block",),
    seeds: Sequence[int] | None = None,
    batch: int = 64,
) -> dict[str, torch.Tensor]:
    """Outputs of blocks for latents at one noise level, x_t = √ᾱ_t·x₀ + √(1−ᾱ_t)·ε.

    Their means over the plane are features for a linear probe (Baranchuk et al. 2022, arXiv 2112.03126, take such
    outputs at small t, where most of the patch is still seen).

    Args:
        pipe: The model.
        latents: Whitened, fp32 [N, C, h, w]; from :meth:`MediPipeline.encode`.
        timestep: t, 0 to the length of the noise schedule less 1.
        conditions: Of N patches, from :meth:`MediPipeline.conditions`; unset: null conditions.
        blocks: Names of :func:`block_names`.
        seeds: Of each patch's noise; unset: 0 to N − 1.
        batch: Latents at a time.

    Returns:
        Each block's output, fp32 [N, channels, height, width] on the CPU.

    Raises:
        UserError: A block or a timestep that the model does not have, or seeds that are not N.
    """
    objective, names, device = Objective(pipe.objective), block_names(pipe), pipe.unet.device
    if unknown := [name for name in blocks if name not in names]:
        raise UserError(f"The network has no block {', '.join(unknown)}.", f"Its blocks are {', '.join(names)}.")
    if not 0 <= timestep < objective.timesteps:
        raise UserError(f"timestep is 0 to {objective.timesteps - 1}, not {timestep}.")
    if seeds is not None and len(seeds) != len(latents):
        raise UserError(f"There are {len(latents)} latents and {len(seeds)} seeds.", "Give one seed per latent.")
    if conditions is None and pipe.conditioning is not None:
        conditions = pipe.conditions([{}] * len(latents))
    noise, _ = draw_noise(range(len(latents)) if seeds is None else seeds, latents.shape[1:])
    t = torch.full((len(latents),), timestep)
    noisy = objective.add_noise(latents.cpu(), noise, t)
    found: dict[str, list[torch.Tensor]] = {name: [] for name in blocks}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # a down block returns its skips, too
            found[name].append(hidden.float().cpu())

        return hook

    pipe.denoiser.eval()
    with ExitStack() as hooks:
        for name in blocks:
            hooks.callback(pipe.unet.get_submodule(name).register_forward_hook(keep(name)).remove)
        for start in range(0, len(latents), batch):
            part = torch.arange(start, min(start + batch, len(latents)))
            given = None if conditions is None else conditions.rows(part).to(device)
            pipe.denoiser(noisy[part].to(device), t[part].to(device), given)
    return {name: torch.cat(outputs) if outputs else torch.empty(0) for name, outputs in found.items()}
