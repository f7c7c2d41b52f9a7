"""The running average of the weights, in fp32; its decay is a pure function of the images seen."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn

from latent_medi.training.settings import EmaSettings

M = TypeVar("M", bound=nn.Module)


@lru_cache(maxsize=8)
def power_exponent(relative_width: float) -> float:
    """Exponent γ of the averaging profile t^γ whose standard deviation is the share ``relative_width`` of the run.

    Solves σ² (γ+2)² (γ+3) = γ+1 (power-function averaging, Karras et al. 2024, arXiv 2312.02696, section 3).
    """
    inverse_square = relative_width**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse_square, 12.0 - inverse_square]).real.max())


def ema_decay(images: int, batch: int, settings: EmaSettings, width: float | None = None) -> float:
    """Decay of the update that brings the run to ``images`` images seen.

    "power": (1 - batch/images)^(γ+1), which keeps the averaging window at a fixed share of the run; its first value is
    0 (a copy). "constant": min(decay, (1+s)/(10+s)) with s the number of updates before this one, so that the average
    forgets its start early.

    Args:
        images: Images seen, this batch included; > 0.
        batch: Images per update.
        settings: Kind and length of the average.
        width: For "power": another relative width than the settings'.
    """
    if settings.kind == "power":
        return max(0.0, 1.0 - batch / images) ** (power_exponent(width or settings.relative_width) + 1.0)
    updates = images / batch - 1.0
    return min(settings.decay, (1.0 + updates) / (10.0 + updates))


class Ema(Generic[M]):
    """A copy of a module whose parameters, and buffers such as batch normalisation's statistics, follow the module's.

    Args:
        module: The trained module (not wrapped for distributed training). Its frozen parameters are shared, not copied.
    """

    def __init__(self, module: M) -> None:
        trained = [p.requires_grad for p in module.parameters()]
        shared = {id(p): p for p in module.parameters() if not p.requires_grad}
        self.module: M = copy.deepcopy(module, shared).eval().requires_grad_(False)
        self._averages: list[torch.Tensor] = [
            p for p, follows in zip(self.module.parameters(), trained, strict=True) if follows
        ]
        if any(p.dtype != torch.float32 for p in self._averages):
            # bf16 rounds an update of size 1e-4 away.
            raise ValueError("The average is kept in fp32; the module has parameters of another type.")
        self._buffers = [b for b in self.module.buffers() if b.is_floating_point()]

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float, made: torch.Tensor | None = None) -> None:
        """average ← decay · average + (1 - decay) · weight, for all tensors in a few fused calls.

        Args:
            module: The trained module.
            decay: As of :func:`ema_decay`.
            made: bool [], on the device; whether the weights were updated at all. If not, the average stays unchanged.
                Unset: they were.
        """
        weights = [p.detach() for p in module.parameters() if p.requires_grad]
        weights += [b for b in module.buffers() if b.is_floating_point()]
        averages = self._averages + self._buffers
        if made is None:
            torch._foreach_lerp_(averages, weights, 1.0 - decay)
            return
        share = made.to(torch.float32) * (1.0 - decay)
        torch._foreach_lerp_(averages, weights, [share] * len(weights))
